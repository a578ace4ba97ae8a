//! The training loop: steps, and what happens between two of them.
//!
//! A step boundary is the only place where a run evaluates, saves, pauses or ends. What happens there depends on the position
//! alone: a run that was killed at a boundary does there what was not done yet.

use crate::{
    checkpoint::{self, BEST, Position, State},
    evaluation::{EvalForm, HeldOut, describe, evaluate},
    logs::Logs,
    metrics::{self, EvalFacts, StepFacts},
    nonfinite::{NonFinite, What},
    optimizer::{Optimizer, norm},
    order::Block,
    pace::{self, Lap, Pace, Work},
    schedule::Schedule,
    step::{StepOutput, Trainer},
    train::Run,
};
use kto_cli::{Context, Error, Kind, Result, signal};
use kto_kernels::{DropoutKey, random};
use kto_model::{lora::Lora, partners::purpose};
use serde_json::{Value, json};
use std::time::Instant;

/// Skipped steps that are reported one by one.
const REPORTED: u64 = 5;

/// Why the loop has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// All steps are done.
    Done,
    /// The evaluations have got no better.
    EarlyStop,
    /// The run has had its time, and is saved.
    Paused,
}

/// The state of the loop.
pub struct Steps<'a> {
    /// The run.
    pub run: &'a Run<'a>,
    /// Makes the gradients.
    pub trainer: Trainer<'a>,
    /// The held-out rows, and what scores them.
    pub held_out: Option<(&'a HeldOut, Trainer<'a>)>,
    /// What is trained.
    pub lora: &'a Lora,
    /// Its moments.
    pub optimizer: &'a Optimizer,
    /// The logs.
    pub logs: Logs,
    /// Where the run stands.
    pub position: Position,
    /// Whether the last checkpoint could not be written.
    pub failing: bool,
    /// Skipped steps that were reported.
    pub warned: u64,
    /// The best adapter so far, when the disk would not take it.
    pub unsaved_best: Option<Lora>,
}

/// What came of a step's rows.
enum Tried {
    Finite(Lora, f64, StepOutput),
    NonFinite(NonFinite, StepOutput),
}

impl Steps<'_> {
    /// Goes on to the end, or until the run has had its time. Returns also the work of this process. Errors: a signal (130, 143), a step
    /// that is not finite (65); what was done is saved by then.
    pub fn run(&mut self) -> Result<(Why, Lap)> {
        let plan = self.run.plan;
        let (total, before) = (self.run.work(plan.total_steps).tokens, self.run.work(self.position.step));
        let pace = Pace::new(self.run.ui, total, before, "first step");
        let start = self.position.step;
        let mut order = (u64::MAX, Vec::new());
        loop {
            if let Some(why) = self.boundary(start, &pace)? {
                return Ok((why, pace.lap()));
            }
            let step = self.position.step;
            let (epoch, at) = (step / plan.steps_per_epoch, step % plan.steps_per_epoch);
            if order.0 != epoch {
                order = (epoch, self.run.order.epoch(epoch));
            }
            self.step(&self.run.order.step(epoch, &order.1, at), &pace)?;
        }
    }

    fn boundary(&mut self, start: u64, pace: &Pace) -> Result<Option<Why>> {
        let (plan, step) = (self.run.plan, self.position.step);
        if plan.evaluates_after(step) && self.position.evaluated.step != step {
            match self.evaluate(pace) {
                // It is made anew on --resume.
                Err(e) if signal::is_stop(e.kind()) => {}
                other => other?,
            }
        }
        let stopped = signal::check();
        let ended = match plan.stops_after(self.position.evaluated.waited) {
            _ if step == plan.total_steps => Some(Why::Done),
            true => Some(Why::EarlyStop),
            // This process has done a step at least: a run that is given too little time gets on all the same.
            false => (step > start && self.run.cadence.is_over()).then_some(Why::Paused),
        };
        if stopped.is_err() || ended == Some(Why::Paused) {
            self.save()?;
        } else if self.run.cadence.is_due(step) {
            self.save_or_warn()?;
        }
        if stopped.is_err() {
            self.run.note_pause(self.position)?;
        }
        stopped.map_err(|e| match step {
            0 => Error::new(e.kind(), format!("{e} before the first step")),
            _ => Error::new(e.kind(), format!("{e} after step {step}, which is saved"))
                .with_hint("--resume goes on from there"),
        })?;
        Ok(ended)
    }

    fn step(&mut self, blocks: &[Block], pace: &Pace) -> Result<()> {
        let (began, plan) = (Instant::now(), self.run.plan);
        let schedule = Schedule {
            kind: plan.typed.schedule,
            peak: plan.lr,
            warmup: plan.warmup_steps,
            total: plan.total_steps,
        };
        let work = blocks.iter().flatten().map(|m| Work::of(self.run.tokens, plan.max_length, m.row, m.row));
        let work: Work = work.sum();
        let tried = self.gradient(blocks, &|share| pace.under_way(work, share))?;
        let lr = schedule.at(self.position.step);
        let mut next = self.position;
        next.step += 1;
        next.num_tokens += work.tokens;
        let (loss, grad_norm) = match &tried {
            Tried::Finite(_, norm, out) => (out.loss, *norm),
            Tried::NonFinite(_, out) => (out.loss, f64::NAN),
        };
        let facts = StepFacts {
            step: next.step,
            loss,
            grad_norm,
            learning_rate: lr,
            num_tokens: next.num_tokens,
            epoch: self.epoch_after(next.step),
        };
        let line = match tried {
            Tried::Finite(gradients, norm, out) => {
                let updated = self.optimizer.step(self.lora, &gradients, norm, lr, next.updates());
                updated.at(format_args!("step {}", next.step))?;
                check_finite(self.lora, next.step)?;
                metrics::line(facts, &out.blocks, plan.typed.loss.loss)
            }
            Tried::NonFinite(bad, out) => {
                next.nonfinite_bytes = self.skip(&bad, next.step)?;
                next.skipped += 1;
                metrics::skipped_line(facts, &out.blocks, plan.typed.loss.loss, bad.rows.len())
            }
        };
        next.metrics_bytes = self.logs.metrics.append(&line)?;
        self.position = next;
        let lap = Lap { work, time: began.elapsed() };
        self.logs.timing.append(&lap.line(next.step, self.run.base.device().peak_memory()))?;
        pace.add(work, &pace::describe(&line, next.step, plan.total_steps));
        Ok(())
    }

    /// Returns how far into the data `step` steps lead, in epochs.
    fn epoch_after(&self, step: u64) -> f64 {
        let (before, per_epoch) = (step - 1, self.run.plan.steps_per_epoch);
        self.run.order.epoch_after(before / per_epoch, before % per_epoch)
    }

    /// Returns the gradient of the next step, its norm and the step's scores, or what was not finite.
    fn gradient(&self, blocks: &[Block], watch: &dyn Fn(f64)) -> Result<Tried> {
        let (plan, done) = (self.run.plan, self.position.step);
        let gradients = self.lora.zeros_like()?;
        let key = random::key(&[plan.seed, purpose("dropout"), done]);
        let p = plan.lora_dropout;
        let dropout = (p > 0.0).then_some(DropoutKey { p, key });
        let out = self.trainer.step(self.lora, blocks, dropout, &gradients, watch);
        let out = out.at(format_args!("step {}", done + 1))?;
        if !out.finite {
            return Ok(Tried::NonFinite(NonFinite::new(What::Loss, blocks, &out.rows), out));
        }
        match norm(&gradients)? {
            grad_norm if grad_norm.is_finite() => Ok(Tried::Finite(gradients, grad_norm, out)),
            _ => Ok(Tried::NonFinite(NonFinite::new(What::Gradient, blocks, &out.rows), out)),
        }
    }

    /// Lists the rows of a step that is not finite, and returns the new length of the list. Unless such steps are skipped this ends the
    /// run (65), with the state before the step saved.
    fn skip(&mut self, bad: &NonFinite, step: u64) -> Result<u64> {
        if !self.run.skip && self.position.step > 0 {
            self.save_or_warn()?;
        }
        let bytes = self.logs.append_nonfinite(&bad.line(step, self.run.tokens))?;
        if self.run.skip {
            self.warned += 1;
            match self.warned {
                ..=REPORTED => self.run.ui.warn(format_args!("step {step} skipped: {}", bad.text())),
                n if n == REPORTED + 1 => {
                    self.run.ui.warn("further skipped steps are listed in nonfinite.jsonl")
                }
                _ => {}
            }
            return Ok(bytes);
        }
        self.logs.sync()?;
        let saved = match self.run.cadence.is_saved(self.position.step) {
            true if self.position.step > 0 => format!("; step {} is saved", self.position.step),
            _ => String::new(),
        };
        let text = format!("step {step}: {}{saved}, its rows are listed in nonfinite.jsonl", bad.text());
        Err(Error::data(text).with_hint("a lower --lr or --beta, or --resume --on-nonfinite skip"))
    }

    fn evaluate(&mut self, pace: &Pace) -> Result<()> {
        let Some((held_out, trainer)) = &self.held_out else { return Ok(()) };
        let (began, run, step) = (Instant::now(), self.run, self.position.step);
        pace.say(&format!("step {step}, evaluation"));
        let form = EvalForm { pack_rows: run.memory.pack_rows, sweep_rows: run.memory.reference_rows };
        let out = evaluate(held_out, trainer, self.lora, form, signal::check)?;
        let loss = if out.finite { out.loss } else { f64::NAN };
        let facts = EvalFacts { step, epoch: self.epoch_after(step), loss };
        let line = metrics::eval_line(facts, &out.blocks, run.plan.typed.loss.loss);
        let work =
            (0..held_out.tokens.len()).map(|row| Work::of(trainer.tokens, trainer.max_length, row, row));
        let mut timing =
            Lap { work: work.sum(), time: began.elapsed() }.line(step, run.base.device().peak_memory());
        timing["phase"] = Value::from("evaluation");
        let mut evaluated = self.position.evaluated;
        let better = evaluated.note(step, loss);
        if better {
            match run.write_adapter(BEST, self.lora) {
                Err(e) if is_of_disk(&e) => {
                    self.unsaved_best = Some(self.lora.deep_copy()?);
                    self.warn_of("best adapter", &e);
                }
                other => {
                    other?;
                    self.unsaved_best = None;
                }
            }
        }
        self.position.eval_bytes = self.logs.append_eval(&line)?;
        self.position.evaluated = evaluated;
        self.logs.timing.append(&timing)?;
        run.ui.note(format_args!("{}{}", describe(&line), if better { ", the best so far" } else { "" }));
        Ok(())
    }

    /// Writes `best/`, if it is not on the disk yet.
    pub fn save_best(&mut self) -> Result<()> {
        if let Some(best) = &self.unsaved_best {
            self.run.write_adapter(BEST, best)?;
        }
        self.unsaved_best = None;
        Ok(())
    }

    /// Saves the position, unless it is on the disk already.
    fn save(&mut self) -> Result<()> {
        let (run, step) = (self.run, self.position.step);
        if run.cadence.is_saved(step) {
            return Ok(());
        }
        self.save_best()?;
        self.logs.sync()?;
        let state = State {
            position: self.position,
            lora: self.lora,
            optimizer: self.optimizer,
            plan: json!(run.plan),
            pack_rows: run.memory.pack_rows,
            of_part: run.base.directory().is_part,
        };
        checkpoint::save(run.dir, state, run.cadence.keep)?;
        run.cadence.saved(step);
        self.failing = false;
        Ok(())
    }

    /// The same, but a disk that is full or fails does not end the run: the older checkpoints stay, and the next one is tried. That is
    /// said once.
    fn save_or_warn(&mut self) -> Result<()> {
        match self.save() {
            Err(e) if is_of_disk(&e) => {
                self.warn_of("checkpoint", &e);
                self.run.cadence.put_off();
                Ok(())
            }
            other => other,
        }
    }

    fn warn_of(&mut self, what: &str, error: &Error) {
        if !self.failing {
            let step = self.position.step;
            self.run
                .ui
                .warn(format_args!("no {what} of step {step}: {error}; older ones stay, training goes on"));
        }
        self.failing = true;
    }
}

/// Whether an error is of a disk that is full or fails.
fn is_of_disk(error: &Error) -> bool {
    matches!(error.kind(), Kind::Io | Kind::CantCreate)
}

/// Fails (65) when a step has left the range of f32: neither a checkpoint nor the result may hold such numbers.
fn check_finite(lora: &Lora, step: u64) -> Result<()> {
    if norm(lora)?.is_finite() {
        return Ok(());
    }
    Err(Error::data(format!("step {step}: the adapter is no longer finite"))
        .with_hint("a lower --lr or --beta; checkpoints are kept"))
}
