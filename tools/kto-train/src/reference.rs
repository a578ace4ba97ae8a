//! The reference pass of a run: made once, kept beside it, gone on with after an interruption.

use crate::{
    memory::pairs,
    pace::{Lap, Pace, Work},
    train::Run,
};
use kto_cli::{Error, Result, hash::sha256_hex, signal};
use kto_model::{
    buffers::Workspace,
    lora::Lora,
    reference::{Pair, PassForm, Reference, sweeps},
    sweep::Sweep,
};
use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// Time between two writes of the cache while it is made.
const INTERVAL: Duration = Duration::from_secs(60);

/// One sweep of the pass.
struct Part {
    work: Work,
    /// Whether an earlier process has done it.
    known: bool,
}

impl Run<'_> {
    /// Scores every pair that the order will ask for, or finds them beside the run.
    /// Returns also the work of this process, if there was any.
    pub fn reference(
        &self,
        initial: Option<&Lora>,
        workspace: &Workspace,
    ) -> Result<(Reference, Option<Lap>)> {
        if !self.plan.typed.loss.loss.needs_reference() {
            return Ok((Reference::default(), None));
        }
        let pairs = pairs(self.plan, self.order, self.plan.total_steps)?;
        let adapter = if initial.is_some() { self.plan.init_adapter.as_str() } else { "base" };
        let key = sha256_hex(
            format!("{} {} {adapter} {}", self.plan.base, self.plan.data, self.plan.max_length).as_bytes(),
        );
        let path = self.dir.file("reference.safetensors");
        let mut reference = Reference::read(&path, &key).unwrap_or_default();
        if reference.covers(&pairs) {
            return Ok((reference, None));
        }
        let form = PassForm {
            max_length: self.plan.max_length,
            pack_rows: self.memory.pack_rows,
            sweep_rows: self.memory.reference_rows,
        };
        let parts = self.parts(&reference, pairs.iter().copied().collect(), form);
        let total: Work = parts.iter().map(|part| part.work).sum();
        self.ui.note(format_args!("reference pass: {} completions, {} tokens", total.rows, total.tokens));
        let pace = Pace::new(self.ui, total.tokens, Work::default(), "reference pass");
        let (at, mut written) = (Cell::new(0), Instant::now());
        let step = |done: &Reference, _| {
            let Part { work, known } = parts[at.replace(at.get() + 1)];
            if known {
                pace.skip(work)
            } else {
                pace.add(work, "reference pass")
            }
            let stopped = signal::check();
            if stopped.is_err() || written.elapsed() > INTERVAL {
                done.write(&path, &key)?;
                written = Instant::now();
            }
            stopped.map_err(|e| {
                let text = format!("{e} while scoring references; the ones done are saved");
                Error::new(e.kind(), text).with_hint("--resume goes on from there")
            })
        };
        let watch = |share| pace.under_way(parts[at.get()].work, share);
        let sweep = Sweep { base: self.base, lora: initial, dropout: None, workspace, watch: Some(&watch) };
        reference.extend(&sweep, self.tokens, form, &pairs, step)?;
        reference.write(&path, &key)?;
        Ok((reference, Some(pace.lap())))
    }

    fn parts(&self, reference: &Reference, pairs: Vec<Pair>, form: PassForm) -> Vec<Part> {
        let work = |p: &Pair| Work::of(self.tokens, form.max_length, p.0 as usize, p.1 as usize);
        let known = |p: &Pair| reference.get(p.0 as usize, p.1 as usize).is_ok();
        let part =
            |pairs: &[Pair]| Part { work: pairs.iter().map(work).sum(), known: pairs.iter().all(known) };
        sweeps(self.tokens, &pairs, form.sweep_rows).into_iter().map(|cut| part(&pairs[cut])).collect()
    }
}
