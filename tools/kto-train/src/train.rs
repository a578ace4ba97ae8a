//! A run from its checkpoint, or its beginning, to its result: references, the steps ([`crate::steps`]), the adapter.

use crate::{
    cadence::Cadence,
    checkpoint::{Position, copy_best},
    data,
    evaluation::HeldOut,
    logs::Logs,
    memory::pairs,
    optimizer::Optimizer,
    order::Order,
    pace::{self, Lap, Work},
    plan::Plan,
    reference::{RefPass, Scored},
    resume::{Resume, Search, foreign},
    run_dir::{LOGS, REFERENCES, RunDir},
    step::Trainer,
    steps::{Steps, Why},
    stored::State,
};
use kto_cli::{Result, Ui, atomic::AtomicDir, signal};
use kto_formats::{
    adapter::{AdapterConfig, AdapterMeta},
    tokens::TokenSet,
};
use kto_model::{
    base::BaseModel,
    buffers::{Workspace, WorkspaceSpec},
    lora::Lora,
    memory::MemoryPlan,
    reference::Reference,
    rows::Packing,
};
use serde_json::{Value, json};

/// The parts of a run.
pub struct Run<'a> {
    /// What will be done.
    pub plan: &'a Plan,
    /// How much memory it takes.
    pub memory: &'a MemoryPlan,
    /// The frozen base.
    pub base: &'a BaseModel,
    /// The rows.
    pub tokens: &'a TokenSet,
    /// The rows of evaluations.
    pub held_out: Option<&'a HeldOut>,
    /// Which rows make a step.
    pub order: &'a Order,
    /// Where it is written.
    pub dir: &'a RunDir,
    /// Whether they came through a pipe.
    pub piped: bool,
    /// When it is saved and paused.
    pub cadence: Cadence,
    /// Whether steps that are not finite are skipped.
    pub skip: bool,
    /// The tool's voice.
    pub ui: &'a Ui,
}

/// How a run has ended, with a line about it.
pub enum Ended {
    /// The adapter is there.
    Finished(String),
    /// It has had its time and is saved.
    Paused(String),
}

/// References of the training rows and of the held-out rows.
type References = (Reference, Reference);

impl Run<'_> {
    /// Trains `lora` in place and writes the run's results.
    pub fn train(&self, lora: &Lora, resume: Option<&Resume>) -> Result<Ended> {
        let initial = if self.plan.typed.reference_is_adapter { Some(lora.deep_copy()?) } else { None };
        let optimizer = Optimizer::new(self.plan.typed.optimizer, lora)?;
        let search = Search { dir: self.dir, plan: self.plan, ui: self.ui };
        if let Some(from) = foreign(self.dir.path(), resume) {
            // Whatever is killed from here on until the next state begins anew with the same command.
            self.write_state(State::Copying, json!({ "from": from.display().to_string() }))?;
        }
        let mut start = resume.map_or(Ok(Position::default()), |how| search.load(how, lora, &optimizer))?;
        self.cadence.saved(start.step);
        self.write_state(State::Running, Value::Null)?;
        if self.piped {
            data::spool(self.dir, self.tokens)?;
        }
        // Of a run that goes back, or whose result was damaged: nobody shall take it for the result.
        self.dir.remove("adapter")?;
        let mut logs = self.open_logs(&mut start)?;
        let MemoryPlan { kept_layers, head_rows, ref on_gpu, .. } = *self.memory;
        let offload_inputs = on_gpu.as_ref().is_some_and(|g| g.offload_inputs);
        let head_in_tiles = on_gpu.as_ref().is_some_and(|g| g.placement.head_tile.is_some());
        let spec = WorkspaceSpec { kept_layers, head_rows, head_in_tiles, offload_inputs };
        let workspace = Workspace::new(&self.base.architecture, Some(lora), spec, self.base.device());
        workspace.reserve_shape(&self.memory.reference.max(self.memory.steps), false)?;
        workspace.reserve_shape(&self.memory.steps, true)?;
        let scored = self.references(initial.as_ref(), &workspace);
        if scored.as_ref().is_err_and(|e| signal::is_stop(e.kind())) {
            self.note_pause(start)?;
        }
        let Some((references, scored)) = scored? else {
            self.note_pause(start)?;
            return Ok(Ended::Paused("the reference pass is not done, what it has is saved".into()));
        };
        if let Some(lap) = scored {
            logs.timing.append(&lap.line(0, self.base.device().peak_memory()))?;
        }
        let mut steps = Steps {
            run: self,
            trainer: self.trainer(&references.0, &workspace),
            held_out: self.held_out.map(|h| (h, self.eval_trainer(h, &references.1, &workspace))),
            lora,
            optimizer: &optimizer,
            logs,
            position: start,
            failing: false,
            warned: 0,
            unsaved_best: None,
        };
        let (why, lap) = steps.run()?;
        steps.save_best()?;
        let Steps { logs, position, .. } = steps;
        let on_gpu = self.base.device().peak_memory();
        self.end(why, position, &logs, lora, pace::summary(position.step - start.step, lap, scored, on_gpu))
    }

    /// Opens the logs at `start`, and says when lines of them are missing.
    fn open_logs(&self, start: &mut Position) -> Result<Logs> {
        let expected = start.log_bytes();
        let logs = Logs::open(self.dir, start, self.held_out.is_some())?;
        for ((name, expected), found) in LOGS.iter().zip(expected).zip(start.log_bytes()) {
            if found < expected {
                self.ui.warn(format_args!(
                    "{name} has {found} bytes, at the checkpoint it had {expected}: lines are missing"
                ));
            }
        }
        Ok(logs)
    }

    /// Returns the references of both kinds of rows and the work of this process on them; nothing when the run has had its time before.
    fn references(
        &self,
        initial: Option<&Lora>,
        workspace: &Workspace,
    ) -> Result<Option<(References, Option<Lap>)>> {
        let pass = RefPass {
            tokens: self.tokens,
            max_length: self.plan.max_length,
            fingerprint: &self.plan.data,
            pairs: pairs(self.plan, self.order, self.plan.total_steps)?,
            file: REFERENCES[0],
            name: "reference pass",
        };
        let Scored::All(train, first) = self.reference(pass, initial, workspace)? else { return Ok(None) };
        let (Some(held_out), Some(fingerprint)) = (self.held_out, &self.plan.eval_data) else {
            return Ok(Some(((train, Reference::default()), first)));
        };
        let pass = RefPass {
            tokens: &held_out.tokens,
            max_length: held_out.max_length(),
            fingerprint,
            pairs: held_out.pairs(),
            file: REFERENCES[1],
            name: "reference pass of the held-out rows",
        };
        let Scored::All(eval, second) = self.reference(pass, initial, workspace)? else { return Ok(None) };
        let both = first.zip(second).map(|(a, b)| Lap { work: a.work + b.work, time: a.time + b.time });
        Ok(Some(((train, eval), both.or(first).or(second))))
    }

    fn trainer<'t>(&'t self, reference: &'t Reference, workspace: &'t Workspace) -> Trainer<'t> {
        Trainer {
            base: self.base,
            tokens: self.tokens,
            reference,
            loss: self.plan.typed.loss,
            max_length: self.plan.max_length,
            packing: self.plan.packing(self.memory.pack_rows),
            workspace,
        }
    }

    fn eval_trainer<'t>(
        &'t self,
        held_out: &'t HeldOut,
        reference: &'t Reference,
        workspace: &'t Workspace,
    ) -> Trainer<'t> {
        Trainer {
            tokens: &held_out.tokens,
            max_length: held_out.max_length(),
            packing: Packing::Shared(self.memory.pack_rows),
            ..self.trainer(reference, workspace)
        }
    }

    /// Returns the work of the first `steps` steps.
    pub fn work(&self, steps: u64) -> Work {
        let work = |row| Work::of(self.tokens, self.plan.max_length, row, row);
        let (passes, rest) = self.order.rows_of(steps);
        let all: Work = (0..self.tokens.len()).map(work).sum();
        let whole = Work { rows: all.rows * passes, tokens: all.tokens * passes };
        whole + rest.into_iter().map(work).sum()
    }

    /// Leaves the run directory as it is to be found.
    fn end(&self, why: Why, end: Position, logs: &Logs, lora: &Lora, summary: String) -> Result<Ended> {
        if why == Why::Paused {
            self.note_pause(end)?;
            return Ok(Ended::Paused(format!(
                "{summary}; step {} of {} is saved",
                end.step, self.plan.total_steps
            )));
        }
        logs.sync()?;
        let best = self.plan.load_best && end.evaluated.best_step > 0;
        match best {
            true => self.copy_best()?,
            false => self.write_adapter("adapter", lora)?,
        }
        let (mut result, mut summary) = (counts(end), summary);
        if self.held_out.is_some() {
            let e = end.evaluated;
            let (step, loss) =
                if e.best_step > 0 { (json!(e.best_step), json!(e.best_loss)) } else { Default::default() };
            result["best_step"] = step;
            result["best_eval_loss"] = loss;
            result["adapter"] = json!(if best { "best" } else { "last" });
            result["early_stop"] = json!(why == Why::EarlyStop);
            if why == Why::EarlyStop {
                summary += &format!(", stopped early: no better eval_loss in {} evaluations", e.waited);
            }
            if e.best_step > 0 {
                summary += &format!(", best eval_loss {:.4} after step {}", e.best_loss, e.best_step);
            }
        }
        if end.skipped > 0 {
            summary += &format!(", {} steps skipped (nonfinite.jsonl)", end.skipped);
        }
        self.write_state(State::Finished, result)?;
        Ok(Ended::Finished(summary))
    }

    /// Says in run.json that the run is saved at a position and not going on.
    pub fn note_pause(&self, at: Position) -> Result<()> {
        self.write_state(State::Paused, counts(at))
    }

    fn write_state(&self, state: State, result: Value) -> Result<()> {
        self.dir.write_manifest(self.plan, self.memory, state, result)
    }

    /// Writes `lora` as a PEFT directory of the run directory.
    pub fn write_adapter(&self, name: &str, lora: &Lora) -> Result<()> {
        let plan = self.plan;
        let base_model_name_or_path = Some(base_name(&plan.typed.model));
        let config = AdapterConfig { base_model_name_or_path, ..plan.typed.adapter.clone() };
        let directory = AtomicDir::create(&self.dir.file(name), true)?;
        let of_part = self.base.directory().is_part;
        let meta = AdapterMeta { base_fingerprint: Some(plan.base.clone()), of_part };
        lora.to_adapter(config)?.write(directory.path(), meta)?;
        directory.commit()
    }

    fn copy_best(&self) -> Result<()> {
        let directory = AtomicDir::create(&self.dir.file("adapter"), true)?;
        copy_best(self.dir, directory.path())?;
        directory.commit()
    }
}

/// Returns what run.json says of a position.
fn counts(position: Position) -> Value {
    json!({ "steps": position.step, "skipped": position.skipped, "num_tokens": position.num_tokens })
}

/// What an adapter calls its base: the path, or the name on the hub without its revision.
fn base_name(model: &std::path::Path) -> String {
    kto_hub::named(model).map_or_else(|| model.display().to_string(), |name| name.repo)
}
