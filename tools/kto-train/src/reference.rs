//! The reference pass of a run: made once, kept beside it, gone on with after an interruption.

use crate::{
    pace::{Lap, Pace, Work},
    train::Run,
};
use kto_cli::{Error, Result, hash::sha256_hex, signal};
use kto_formats::tokens::TokenSet;
use kto_model::{
    buffers::Workspace,
    lora::Lora,
    reference::{Pair, PassForm, Reference, sweeps},
    sweep::Sweep,
};
use std::{
    cell::Cell,
    collections::BTreeSet,
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

/// What a pass scores, and where it is kept.
pub struct RefPass<'a> {
    /// The rows.
    pub tokens: &'a TokenSet,
    /// Tokens after which a row is cut.
    pub max_length: usize,
    /// The SHA-256 of the rows.
    pub fingerprint: &'a str,
    /// The pairs.
    pub pairs: BTreeSet<Pair>,
    /// The cache in the run directory.
    pub file: &'static str,
    /// What the user reads.
    pub name: &'static str,
}

/// How a pass ended.
pub enum Scored {
    /// With all references, and the work of this process, if there was any.
    All(Reference, Option<Lap>),
    /// Before its end, because the run has had its time. What was scored is kept.
    Paused,
}

impl Run<'_> {
    /// Scores every pair of a pass, or finds them beside the run.
    pub fn reference(&self, pass: RefPass, initial: Option<&Lora>, workspace: &Workspace) -> Result<Scored> {
        if !self.plan.typed.loss.loss.needs_reference() {
            return Ok(Scored::All(Reference::default(), None));
        }
        let adapter = if initial.is_some() { self.plan.init_adapter.as_str() } else { "base" };
        let key = sha256_hex(
            format!("{} {} {adapter} {}", self.plan.base, pass.fingerprint, pass.max_length).as_bytes(),
        );
        let path = self.dir.file(pass.file);
        let mut reference = match Reference::read(&path, &key) {
            Ok(cached) => cached.unwrap_or_default(),
            // The same numbers come out again: nothing is lost but time.
            Err(e) => {
                self.ui.warn(format_args!("{e}; the {} is made again", pass.name));
                Reference::default()
            }
        };
        if reference.covers(&pass.pairs) {
            return Ok(Scored::All(reference, None));
        }
        let form = PassForm {
            max_length: pass.max_length,
            pack_rows: self.memory.pack_rows,
            sweep_rows: self.memory.reference_rows,
        };
        let parts = self.parts(&reference, &pass, form);
        let total: Work = parts.iter().map(|part| part.work).sum();
        self.ui.note(format_args!("{}: {} completions, {} tokens", pass.name, total.rows, total.tokens));
        let pace = Pace::new(self.ui, total.tokens, Work::default(), pass.name);
        let (at, mut written) = (Cell::new(0), Instant::now());
        let paused = Cell::new(false);
        let step = |done: &Reference, _| {
            let Part { work, known } = parts[at.replace(at.get() + 1)];
            if known {
                pace.skip(work)
            } else {
                pace.add(work, pass.name)
            }
            let stopped = signal::check();
            paused.set(!known && at.get() < parts.len() && self.cadence.is_over());
            if stopped.is_err() || paused.get() || written.elapsed() > INTERVAL {
                done.write(&path, &key)?;
                written = Instant::now();
            }
            stopped.map_err(|e| {
                let text = format!("{e} while scoring references; the ones done are saved");
                Error::new(e.kind(), text).with_hint("--resume goes on from there")
            })?;
            // Not an error for the user: it only ends the pass.
            if paused.get() { Err(Error::internal("paused")) } else { Ok(()) }
        };
        let watch = |share| pace.under_way(parts[at.get()].work, share);
        let sweep = Sweep { base: self.base, lora: initial, dropout: None, workspace, watch: Some(&watch) };
        match reference.extend(&sweep, pass.tokens, form, &pass.pairs, step) {
            Err(_) if paused.get() => return Ok(Scored::Paused),
            other => other?,
        }
        reference.write(&path, &key)?;
        Ok(Scored::All(reference, Some(pace.lap())))
    }

    fn parts(&self, reference: &Reference, pass: &RefPass, form: PassForm) -> Vec<Part> {
        let pairs: Vec<Pair> = pass.pairs.iter().copied().collect();
        let work = |p: &Pair| Work::of(pass.tokens, form.max_length, p.0 as usize, p.1 as usize);
        let known = |p: &Pair| reference.get(p.0 as usize, p.1 as usize).is_ok();
        let part =
            |pairs: &[Pair]| Part { work: pairs.iter().map(work).sum(), known: pairs.iter().all(known) };
        sweeps(pass.tokens, &pairs, form.sweep_rows).into_iter().map(|cut| part(&pairs[cut])).collect()
    }
}
