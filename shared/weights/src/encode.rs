//! The way of a tensor through memory: a piece at a time, all threads at work on it.

use crate::{Errors, Values};
use kto_cli::{Context, Error, Kind, Result, escape, signal};
use kto_formats::tensors::non_finite;
use kto_kernels::quant::{Codec, PLANES};
use rayon::prelude::*;
use std::ops::Range;

/// Values of a task, about: source, floats and codes of them stay in the second-level cache.
const TASK: usize = 1 << 15;
/// Tasks of a piece for each thread: enough that the threads end at about the same time.
const TASKS: usize = 16;

/// Puts stored bytes back where nothing has changed: called with the index of the first value, the values, and the planes that
/// the codec made of them.
pub type Keep<'a> = dyn Fn(usize, &[f32], [&mut [u8]; PLANES]) + Sync + 'a;

/// Encodes all values of the tensor `name` and passes on every plane's bytes in order, a piece at a time: while one piece is passed on, by the
/// calling thread, the others encode the next. Returns the errors when `measure` is set. Errors: 65 for a value that is not finite or too
/// large for the form; the signal's kind after a signal.
pub fn encode(
    name: &str,
    values: &dyn Values,
    codec: &dyn Codec,
    keep: Option<&Keep>,
    measure: bool,
    sink: &mut dyn FnMut(usize, &[u8]) -> Result<()>,
) -> Result<Errors> {
    let length = values.len();
    // Tasks are whole rows and whole units.
    let step = lcm(values.columns().max(1), codec.unit());
    let task = TASK.div_ceil(step) * step;
    let piece = task * TASKS * rayon::current_num_threads();
    let job = Job { name, values, codec, keep, measure, task };
    let planes = || codec.planes(piece.min(length)).map(|n| vec![0; n]);
    let (mut next, mut last) = (planes(), planes());
    let mut pass = |planes: &[Vec<u8>; PLANES], range: Range<usize>| {
        for (plane, (bytes, n)) in planes.iter().zip(codec.planes(range.len())).enumerate() {
            if n > 0 {
                sink(plane, &bytes[..n])?;
            }
        }
        values.done(range);
        Ok(())
    };
    let mut errors = Errors::default();
    let mut encoded = None;
    for start in (0..length).step_by(piece) {
        signal::check()?;
        let range = start..(start + piece).min(length);
        let mut made = Ok(Vec::new());
        let passed = rayon::in_place_scope(|scope| {
            let (made, next, range) = (&mut made, &mut next, range.clone());
            scope.spawn(move |_| *made = job.piece(range, next));
            encoded.map_or(Ok(()), |range| pass(&last, range))
        });
        passed?;
        made?.iter().for_each(|e| errors.append(e));
        std::mem::swap(&mut next, &mut last);
        encoded = Some(range);
    }
    encoded.map_or(Ok(()), |range| pass(&last, range))?;
    Ok(errors)
}

/// Puts the place of a tensor's values in front of what is wrong with them. A disk that is full, a stop: these are of the output, which
/// such an error names itself.
pub(crate) fn placed<T>(result: Result<T>, place: &str) -> Result<T> {
    match result {
        Err(error) if error.kind() == Kind::Data => Err(error).at(place),
        other => other,
    }
}

/// What is done with every piece of a tensor.
#[derive(Clone, Copy)]
struct Job<'a> {
    name: &'a str,
    values: &'a dyn Values,
    codec: &'a dyn Codec,
    keep: Option<&'a Keep<'a>>,
    measure: bool,
    /// Values of a task.
    task: usize,
}

impl Job<'_> {
    /// Encodes a range of values into the planes, on all threads.
    fn piece(&self, range: Range<usize>, planes: &mut [Vec<u8>; PLANES]) -> Result<Vec<Errors>> {
        let mut rest: [&mut [u8]; PLANES] = planes.each_mut().map(|plane| &mut plane[..]);
        let mut tasks = Vec::with_capacity(range.len().div_ceil(self.task));
        for at in range.clone().step_by(self.task) {
            let here = self.task.min(range.end - at);
            let mut mine: [&mut [u8]; PLANES] = Default::default();
            for ((rest, mine), n) in rest.iter_mut().zip(&mut mine).zip(self.codec.planes(here)) {
                let (now, later) = std::mem::take(rest).split_at_mut(n);
                (*mine, *rest) = (now, later);
            }
            tasks.push((at, here, mine));
        }
        let one = |scratch: &mut Vec<f32>, (at, here, planes)| self.task(scratch, at, here, planes);
        tasks.into_par_iter().map_init(Vec::new, one).collect()
    }

    /// Encodes `here` values from `at` on.
    fn task(
        &self,
        scratch: &mut Vec<f32>,
        at: usize,
        here: usize,
        mut planes: [&mut [u8]; PLANES],
    ) -> Result<Errors> {
        let (name, codec) = (self.name, self.codec);
        scratch.resize(here, 0.0);
        self.values.read(at, scratch);
        if !all_finite(scratch) {
            let index = scratch.iter().position(|v| !v.is_finite()).unwrap_or(0);
            return Err(non_finite(name, at + index, scratch[index]));
        }
        if !codec.encode(scratch, planes.each_mut().map(|p| &mut **p)) {
            let most = scratch.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            return Err(Error::data(format!(
                "tensor \"{}\": values up to {most:e} are too large for the form",
                escape(name)
            )));
        }
        if let Some(keep) = self.keep {
            keep(at, scratch, planes.each_mut().map(|p| &mut **p));
        }
        let mut errors = Errors::default();
        if self.measure {
            let mut back = vec![0.0; here];
            codec.decode(planes.map(|p| &*p), &mut back);
            errors.add(scratch, &back);
        }
        Ok(errors)
    }
}

fn all_finite(values: &[f32]) -> bool {
    let mut bad = 0u32;
    for v in values {
        bad |= u32::from(v.to_bits() & 0x7f80_0000 == 0x7f80_0000);
    }
    bad == 0
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

#[cfg(test)]
mod tests {
    use super::*;
    use kto_kernels::quant::{FourBit, Kind};

    struct Wave(usize, usize);

    impl Values for Wave {
        fn len(&self) -> usize {
            self.0
        }
        fn columns(&self) -> usize {
            self.1
        }
        fn read(&self, start: usize, out: &mut [f32]) {
            assert!(start.is_multiple_of(self.1));
            out.iter_mut().enumerate().for_each(|(i, o)| *o = ((start + i) as f32).sin());
        }
    }

    #[test]
    fn pieces_and_tasks_do_not_show() {
        let codec = FourBit { kind: Kind::Nf4, block: 64 };
        for (rows, columns) in [(1, 1), (3, 7), (1, 100_001), (401, 33_000), (70_001, 1)] {
            let n = rows * columns;
            let wave = Wave(n, columns);
            let mut all = vec![0.0; n];
            wave.read(0, &mut all);
            let [mut codes, mut scales, _] = codec.planes(n).map(|n| vec![0; n]);
            codec.encode(&all, [&mut codes, &mut scales, &mut []]);
            let mut made = [Vec::new(), Vec::new(), Vec::new()];
            let errors = encode("w", &wave, &codec, None, true, &mut |plane, bytes| {
                made[plane].extend_from_slice(bytes);
                Ok(())
            });
            assert!(made == [codes, scales, Vec::new()], "{rows} × {columns}");
            let errors = errors.unwrap();
            assert!(errors.count == n as u64 && errors.relative() < 0.15);
        }
    }

    #[test]
    fn what_is_not_finite_is_named() {
        struct Bad;
        impl Values for Bad {
            fn len(&self) -> usize {
                100_000
            }
            fn columns(&self) -> usize {
                10
            }
            fn read(&self, start: usize, out: &mut [f32]) {
                out.fill(1.0);
                if (start..start + out.len()).contains(&77_777) {
                    out[77_777 - start] = f32::NAN;
                }
            }
        }
        let codec = FourBit { kind: Kind::Nf4, block: 64 };
        let error = encode("w", &Bad, &codec, None, false, &mut |_, _| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "tensor \"w\": NaN at index 77777");
    }
}
