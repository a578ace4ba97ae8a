//! The training loop: references, steps, metrics, checkpoints, the adapter.

use crate::{
    checkpoint::{self, Position},
    metrics::{self, StepFacts},
    optimizer::{Optimizer, norm},
    order::{Block, Order},
    pace::{self, Lap, Pace, Work},
    plan::Plan,
    run_dir::RunDir,
    run_log::RunLog,
    schedule::Schedule,
    step::{StepOutput, Trainer},
};
use candle_core::DType;
use kto_cli::{Error, Result, Ui, atomic::AtomicDir, signal};
use kto_formats::{
    adapter::{AdapterConfig, AdapterMeta},
    tokens::TokenSet,
};
use kto_kernels::{DropoutKey, random};
use kto_model::{
    base::BaseModel,
    buffers::{Workspace, WorkspaceSpec},
    lora::Lora,
    memory::MemoryPlan,
    partners::purpose,
};
use serde_json::{Value, json};
use std::time::Instant;

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
    /// Which rows make a step.
    pub order: &'a Order,
    /// Where it is written.
    pub dir: &'a RunDir,
    /// Steps between checkpoints.
    pub checkpoint_every: Option<u64>,
    /// The tool's voice.
    pub ui: &'a Ui,
}

impl Run<'_> {
    /// Trains `lora` in place, writes the run's results and returns a line about them.
    pub fn train(&self, lora: &Lora, resume: bool) -> Result<String> {
        let initial = if self.plan.typed.reference_is_adapter { Some(lora.deep_copy()?) } else { None };
        let optimizer = Optimizer::new(self.plan.typed.optimizer, lora)?;
        let warn = |line| self.ui.warn(line);
        let start = if resume {
            checkpoint::load(self.dir, lora, &optimizer, warn)?.unwrap_or_default()
        } else {
            Position::default()
        };
        self.dir.write_manifest(self.plan, self.memory, "running", Value::Null)?;
        let mut logs = Logs {
            metrics: RunLog::open_at(self.dir.file("metrics.jsonl"), start.metrics_bytes)?,
            timing: RunLog::open_end(self.dir.file("timing.jsonl"))?,
        };
        let spec = WorkspaceSpec { kept_layers: self.memory.kept_layers, head_rows: self.memory.head_rows };
        let workspace = Workspace::new(&self.base.architecture, Some(lora), spec, DType::F32);
        workspace.reserve_shape(&self.memory.reference.max(self.memory.steps), false)?;
        workspace.reserve_shape(&self.memory.steps, true)?;
        let (reference, scored) = self.reference(initial.as_ref(), &workspace)?;
        if let Some(lap) = scored {
            logs.timing.append(&lap.line(0))?;
        }
        let trainer = Trainer {
            base: self.base,
            tokens: self.tokens,
            reference: &reference,
            loss: self.plan.typed.loss,
            max_length: self.plan.max_length,
            packing: self.plan.packing(self.memory.pack_rows),
            workspace: &workspace,
        };
        let (end, lap) = self.steps(&trainer, lora, &optimizer, start, &mut logs)?;
        logs.metrics.sync()?;
        self.save_adapter(lora)?;
        self.dir.write_manifest(
            self.plan,
            self.memory,
            "finished",
            json!({ "steps": end.step, "num_tokens": end.num_tokens }),
        )?;
        Ok(pace::summary(end.step - start.step, lap, scored))
    }

    /// Returns the work of the first `steps` steps.
    fn work(&self, steps: u64) -> Work {
        let work = |row| Work::of(self.tokens, self.plan.max_length, row, row);
        let (passes, rest) = self.order.rows_of(steps);
        let all: Work = (0..self.tokens.len()).map(work).sum();
        let whole = Work { rows: all.rows * passes, tokens: all.tokens * passes };
        whole + rest.into_iter().map(work).sum()
    }

    fn steps(
        &self,
        trainer: &Trainer,
        lora: &Lora,
        optimizer: &Optimizer,
        start: Position,
        logs: &mut Logs,
    ) -> Result<(Position, Lap)> {
        let plan = self.plan;
        let schedule = Schedule {
            kind: plan.typed.schedule,
            peak: plan.lr,
            warmup: plan.warmup_steps,
            total: plan.total_steps,
        };
        let (total, before) = (self.work(plan.total_steps).tokens, self.work(start.step));
        let pace = Pace::new(self.ui, total, before, "first step");
        let mut position = start;
        let mut order = (u64::MAX, Vec::new());
        while position.step < plan.total_steps {
            let began = Instant::now();
            let (epoch, at) = (position.step / plan.steps_per_epoch, position.step % plan.steps_per_epoch);
            if order.0 != epoch {
                order = (epoch, self.order.epoch(epoch));
            }
            let blocks = self.order.step(epoch, &order.1, at);
            let work: Work =
                blocks.iter().flatten().map(|m| Work::of(self.tokens, plan.max_length, m.row, m.row)).sum();
            let watch = |share: f64| pace.under_way(work, share);
            let (gradients, grad_norm, out) = self.gradient(trainer, lora, position.step, &blocks, &watch)?;
            let lr = schedule.at(position.step);
            position.step += 1;
            optimizer.step(lora, &gradients, grad_norm, lr, position.step)?;
            check_finite(lora, position.step)?;
            position.num_tokens += work.tokens;
            let epoch = self.order.epoch_after(epoch, at);
            let facts = StepFacts {
                step: position.step,
                loss: out.loss,
                grad_norm,
                learning_rate: lr,
                num_tokens: position.num_tokens,
                epoch,
            };
            let line = metrics::line(facts, &out.blocks, plan.typed.loss.loss);
            position.metrics_bytes = logs.metrics.append(&line)?;
            logs.timing.append(&Lap { work, time: began.elapsed() }.line(position.step))?;
            pace.add(work, &pace::describe(&line, position.step, plan.total_steps));
            self.after_step(position, lora, optimizer, logs)?;
        }
        Ok((position, pace.lap()))
    }

    /// Returns the gradient of step `done + 1`, its norm and the step's scores. Error (65), naming step and rows, when it is not finite.
    fn gradient(
        &self,
        trainer: &Trainer,
        lora: &Lora,
        done: u64,
        blocks: &[Block],
        watch: &dyn Fn(f64),
    ) -> Result<(Lora, f64, StepOutput)> {
        let gradients = lora.zeros_like()?;
        let key = random::key(&[self.plan.seed, purpose("dropout"), done]);
        let p = self.plan.lora_dropout;
        let dropout = (p > 0.0).then_some(DropoutKey { p, key });
        let at = |e: Error| Error::new(e.kind(), format!("step {}: {e}", done + 1));
        let out = trainer.step(lora, blocks, dropout, &gradients, watch).map_err(at)?;
        let grad_norm = norm(&gradients)?;
        if !grad_norm.is_finite() {
            let rows: Vec<String> = blocks.iter().flatten().map(|m| (m.row + 1).to_string()).collect();
            let text = format!("the gradient is not finite (rows {})", rows.join(", "));
            return Err(at(Error::data(text)).with_hint("a lower --lr or --beta; checkpoints are kept"));
        }
        Ok((gradients, grad_norm, out))
    }

    /// Saves when it is time to, and ends the run after a signal.
    fn after_step(&self, position: Position, lora: &Lora, optimizer: &Optimizer, logs: &Logs) -> Result<()> {
        let stopped = signal::check();
        let due = self.checkpoint_every.is_some_and(|n| position.step.is_multiple_of(n));
        if due || stopped.is_err() {
            logs.metrics.sync()?;
            checkpoint::save(self.dir, position, lora, optimizer)?;
        }
        stopped.map_err(|e| {
            let text = format!("{e} after step {}, which is saved", position.step);
            Error::new(e.kind(), text).with_hint("--resume goes on from there")
        })
    }

    fn save_adapter(&self, lora: &Lora) -> Result<()> {
        let plan = self.plan;
        let config = AdapterConfig {
            r: plan.lora_r,
            lora_alpha: plan.lora_alpha,
            lora_dropout: plan.lora_dropout,
            target_modules: plan.target_modules.clone(),
            base_model_name_or_path: Some(plan.typed.model.display().to_string()),
            use_rslora: plan.use_rslora,
        };
        let directory = AtomicDir::create(&self.dir.file("adapter"), true)?;
        lora.to_adapter(config)?
            .write(directory.path(), AdapterMeta { base_fingerprint: Some(plan.base.clone()) })?;
        directory.commit()
    }
}

/// Fails (65) when a step has left the range of f32: neither a checkpoint nor the result may hold such numbers.
fn check_finite(lora: &Lora, step: u64) -> Result<()> {
    if norm(lora)?.is_finite() {
        return Ok(());
    }
    Err(Error::data(format!("step {step}: the adapter is no longer finite"))
        .with_hint("a lower --lr or --beta; checkpoints are kept"))
}

/// The files that grow with every step.
struct Logs {
    metrics: RunLog,
    timing: RunLog,
}
