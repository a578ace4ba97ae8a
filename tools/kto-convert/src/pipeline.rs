//! Work on all cores whose results come in order.
//!
//! One thread cuts the input, others do the work, the caller's takes the results in the order of the input. What is under way is
//! bounded, so memory is too. Whatever ends the run, the threads end with it.

use std::{
    sync::{Arc, Mutex, mpsc},
    thread,
};

/// Runs `next` on a thread of its own until it returns `None`, `work` on `threads` threads, and gives the results in order to
/// `take` until it fails.
pub fn run<J: Send, D: Send, E>(
    threads: usize,
    mut next: impl FnMut() -> Option<J> + Send,
    work: impl Fn(J) -> D + Sync,
    mut take: impl FnMut(D) -> Result<(), E>,
) -> Result<(), E> {
    thread::scope(|scope| {
        // A job and its result's way travel apart: the ways keep the order.
        let (jobs, queue) = mpsc::sync_channel::<(J, mpsc::SyncSender<D>)>(threads);
        let (ways, ordered) = mpsc::sync_channel::<mpsc::Receiver<D>>(2 * threads);
        let queue = Arc::new(Mutex::new(queue));
        let work = &work;
        scope.spawn(move || {
            while let Some(job) = next() {
                let (done, way) = mpsc::sync_channel(1);
                // Nobody takes results any more, or nobody works: the run is over.
                if ways.send(way).is_err() || jobs.send((job, done)).is_err() {
                    return;
                }
            }
        });
        for _ in 0..threads {
            let queue = Arc::clone(&queue);
            scope.spawn(move || {
                loop {
                    let job = queue.lock().map(|queue| queue.recv());
                    let Ok(Ok((job, done))) = job else { return };
                    // The receiver is gone when the run has failed; the queue ends soon.
                    let _ = done.send(work(job));
                }
            });
        }
        // Only the workers hold the queue: without them the cutter must not wait.
        drop(queue);
        // A worker that panics drops its way; the scope hands the panic on.
        ordered.into_iter().filter_map(|way| way.recv().ok()).try_for_each(&mut take)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order() {
        for threads in [1, 2, 7] {
            let mut numbers = 0..1000;
            let mut seen = Vec::new();
            let work = |n: u64| {
                if n.is_multiple_of(97) {
                    thread::sleep(std::time::Duration::from_millis(2));
                }
                n * 2
            };
            let result: Result<(), ()> = run(
                threads,
                || numbers.next(),
                work,
                |n| {
                    seen.push(n);
                    Ok(())
                },
            );
            assert_eq!(result, Ok(()));
            assert!(seen.into_iter().eq((0..1000).map(|n| n * 2)));
        }
    }

    #[test]
    fn a_failure_ends_an_endless_input() {
        let mut numbers = 0..;
        let result = run(2, || numbers.next(), |n: u64| n, |n| if n == 50 { Err(n) } else { Ok(()) });
        assert_eq!(result, Err(50));
    }
}
