//! Threads that stay awake between the operations of a sweep.
//!
//! A training step is thousands of short parallel operations. Waking a sleeping thread for each costs up to a tenth of the step, so
//! helpers wait for the next one with their eyes open. They are tasks of the rayon pool at hand, which so keeps its say in the number
//! of threads. Invariant: while a job is open its closure is alive, because [`Team::run`] returns only when every helper has left it.

use std::{
    cell::{Cell, UnsafeCell},
    hint::spin_loop,
    ptr::NonNull,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::*},
    time::Duration,
};

thread_local! {
    /// The team that this thread leads.
    static LED: Cell<Option<NonNull<Team>>> = const { Cell::new(None) };
}

/// Runs `f`; what it computes in parallel is shared with helpers that stay awake meanwhile. Inside of itself it does nothing more.
pub fn with_team<R>(f: impl FnOnce() -> R) -> R {
    let helpers = rayon::current_num_threads() - 1;
    if helpers == 0 || LED.get().is_some() {
        return f();
    }
    let team = Team::new(helpers + 1);
    rayon::in_place_scope(|scope| {
        let team = &team;
        for member in 1..=helpers {
            scope.spawn(move |_| team.help(member));
        }
        let _end = End(team);
        LED.set(Some(NonNull::from(team)));
        f()
    })
}

/// Calls `f` for every index with the team of this thread. Returns false, having done nothing, where there is none.
pub(super) fn run(n: usize, f: &(impl Fn(usize) + Sync)) -> bool {
    // Taken while it runs: what a task does in parallel is not for the same team.
    let Some(team) = LED.take() else { return false };
    let _lead = Lead(team);
    // SAFETY: `with_team` keeps the team alive for as long as it is in LED.
    unsafe { team.as_ref() }.run(n, f);
    true
}

/// One job at a time: a closure, and for every member the next index of its share. Shares are runs of neighbouring indices, so that
/// a member meets the rows again that it has in its cache; who has done its share takes from the others'.
struct Team {
    open: AtomicBool,
    stop: AtomicBool,
    /// Counts jobs.
    epoch: AtomicUsize,
    /// Helpers that look at the job.
    inside: AtomicUsize,
    next: Vec<Counter>,
    job: UnsafeCell<Option<Job>>,
}
// SAFETY: `job` is written only while closed and nobody is inside, and read only inside while open.
unsafe impl Sync for Team {}

/// On a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Counter(AtomicUsize);

#[derive(Clone, Copy)]
struct Job {
    n: usize,
    data: *const (),
    call: unsafe fn(*const (), usize),
}

impl Team {
    fn new(members: usize) -> Self {
        Self {
            open: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            epoch: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            next: (0..members).map(|_| Counter::default()).collect(),
            job: UnsafeCell::new(None),
        }
    }

    fn run<F: Fn(usize) + Sync>(&self, n: usize, f: &F) {
        unsafe fn call<F: Fn(usize)>(data: *const (), i: usize) {
            // SAFETY: `data` is the closure of the open job.
            unsafe { (*data.cast::<F>())(i) }
        }
        let job = Job { n, data: std::ptr::from_ref(f).cast(), call: call::<F> };
        // SAFETY: closed, and nobody is inside: the last run waited for it.
        unsafe { *self.job.get() = Some(job) };
        self.next.iter().for_each(|next| next.0.store(0, Relaxed));
        self.epoch.fetch_add(1, Release);
        self.open.store(true, SeqCst);
        let _close = Close(self);
        self.work(0, job);
    }

    fn work(&self, member: usize, job: Job) {
        let members = self.next.len();
        for share in (member..members).chain(0..member) {
            let (start, end) = (share * job.n / members, (share + 1) * job.n / members);
            loop {
                let i = start + self.next[share].0.fetch_add(1, Relaxed);
                if i >= end {
                    break;
                }
                // SAFETY: the job is open, so its closure is alive.
                unsafe { (job.call)(job.data, i) };
            }
        }
    }

    /// Joins every job until the team ends.
    fn help(&self, member: usize) {
        let (mut seen, mut idle) = (0, 0u32);
        while !self.stop.load(Acquire) {
            if self.epoch.load(Acquire) == seen || !self.open.load(SeqCst) {
                idle = idle.saturating_add(1);
                wait(idle);
                continue;
            }
            idle = 0;
            self.inside.fetch_add(1, SeqCst);
            let _leave = Leave(self);
            // Open after coming inside: it stays so, and the job the same, until this helper has left.
            if self.open.load(SeqCst) {
                seen = self.epoch.load(Acquire);
                // SAFETY: as said above.
                if let Some(job) = unsafe { *self.job.get() } {
                    self.work(member, job);
                }
            }
        }
    }
}

/// Waits a little, and longer the longer nothing came: first for the next operation, then for a slow file.
fn wait(idle: u32) {
    match idle {
        0..4_000 => spin_loop(),
        4_000..20_000 => std::thread::yield_now(),
        _ => std::thread::sleep(Duration::from_micros(50)),
    }
}

// The ends of all these are drops, so that they also happen when a task panics.

struct Close<'a>(&'a Team);
impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.open.store(false, SeqCst);
        let mut idle = 0u32;
        while self.0.inside.load(SeqCst) != 0 {
            idle = idle.saturating_add(1);
            wait(idle.min(19_999));
        }
    }
}

struct Leave<'a>(&'a Team);
impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, SeqCst);
    }
}

struct Lead(NonNull<Team>);
impl Drop for Lead {
    fn drop(&mut self) {
        LED.set(Some(self.0));
    }
}

struct End<'a>(&'a Team);
impl Drop for End<'_> {
    fn drop(&mut self) {
        LED.set(None);
        self.0.stop.store(true, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn every_index_is_taken_once_in_every_job() {
        for threads in [1, 2, 5] {
            pool(threads).install(|| {
                with_team(|| {
                    for n in (0..300).chain([5_000]) {
                        let marks: Vec<AtomicU64> = (0..n).map(|_| AtomicU64::new(0)).collect();
                        let led = run(n, &|i| {
                            marks[i].fetch_add(1 + i as u64, Relaxed);
                        });
                        assert_eq!(led, threads > 1);
                        assert!(
                            !led || marks.iter().enumerate().all(|(i, m)| m.load(Relaxed) == 1 + i as u64)
                        );
                    }
                });
                assert!(!run(3, &|_| panic!("no team is left")));
            });
        }
    }

    #[test]
    fn a_task_of_a_team_finds_no_team() {
        pool(3).install(|| {
            with_team(|| {
                let found = AtomicUsize::new(0);
                run(50, &|_| {
                    found.fetch_add(usize::from(run(1, &|_| {})), Relaxed);
                });
                assert_eq!(found.load(Relaxed), 0);
                assert!(run(1, &|_| {}));
            });
        });
    }

    #[test]
    fn a_panic_of_a_task_comes_out_and_ends_the_team() {
        for culprit in [0, 40] {
            let caught = std::panic::catch_unwind(|| {
                pool(4).install(|| with_team(|| run(64, &|i| assert!(i != culprit, "task {i}"))))
            });
            assert!(caught.is_err());
        }
        assert!(!run(1, &|_| {}));
    }
}
