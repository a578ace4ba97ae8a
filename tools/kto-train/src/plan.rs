//! From what the user asked for to what will be done, with every value explicit. The plan is the run's manifest.

use crate::{
    adapter,
    args::{Args, LossKind, Preset, ReferenceKind, ScheduleKind},
    evaluation::HeldOut,
    optimizer::OptimizerSpec,
    weights::Weights,
};
use kto_cli::{Context, Error, Result};
use kto_formats::{
    adapter::{Adapter, AdapterConfig, Targets},
    model_dir::ModelDir,
    tensors::FileStamp,
    tokens::TokenSet,
};
use kto_model::{
    architecture::Architecture,
    fit,
    lora::LoraLayout,
    loss::{Loss, LossSpec},
    rows::Packing,
    whole::Shapes,
};
use serde::Serialize;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Everything that decides the result, and nothing that does not.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// SHA-256 identity of the base.
    pub base: String,
    /// SHA-256 of all its weights; not looked for in a dry run.
    pub base_weights: Option<String>,
    /// SHA-256 of the token rows.
    pub data: String,
    /// Number of rows.
    pub rows: usize,
    /// Tokens after which a row is cut.
    pub max_length: usize,
    /// SHA-256 over the initial adapter's settings and numbers, or "fresh".
    pub init_adapter: String,
    /// base or init-adapter.
    pub reference: String,
    /// Rank of the adapter.
    pub lora_r: usize,
    /// Alpha of the adapter.
    pub lora_alpha: f64,
    /// Scale by alpha/√r.
    pub use_rslora: bool,
    /// Dropout on the adapter's input.
    pub lora_dropout: f64,
    /// Rows of adapted weights have trained lengths.
    pub use_dora: bool,
    /// Adapted modules.
    pub target_modules: Targets,
    /// Modules that are not adapted after all.
    pub exclude_modules: Option<Value>,
    /// Adapted blocks.
    pub layers_to_transform: Option<Value>,
    /// How the name of a block's list is found.
    pub layers_pattern: Option<Value>,
    /// Other ranks.
    pub rank_pattern: Option<Value>,
    /// Other alphas.
    pub alpha_pattern: Option<Value>,
    /// Modules that are trained whole.
    pub modules_to_save: Option<Value>,
    /// Biases that are trained, if any are.
    pub bias: Option<Value>,
    /// What the matrices began with, when it is not PEFT's default.
    pub init_lora_weights: Option<Value>,
    /// kto, apo-zero or sft.
    pub loss: String,
    /// Strength of the pull towards the reference.
    pub beta: f64,
    /// Weight of rows with label true.
    pub desirable_weight: f64,
    /// Weight of rows with label false.
    pub undesirable_weight: f64,
    /// Peak learning rate.
    pub lr: f64,
    /// linear, cosine or constant.
    pub schedule: String,
    /// Steps of rising learning rate.
    pub warmup_steps: u64,
    /// adamw or adamw-8bit.
    pub optimizer: String,
    /// Decay of the first moment.
    pub adam_beta1: f64,
    /// Decay of the second moment.
    pub adam_beta2: f64,
    /// Added to AdamW's denominator.
    pub adam_epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest gradient norm; 0 is no limit.
    pub max_grad_norm: f64,
    /// Device and element type of the computation: cpu f32, cuda bf16, ….
    pub compute: String,
    /// Rows per step.
    pub batch: usize,
    /// Rows per KL block: the whole step, unless `preset` is trl.
    pub micro_batch: usize,
    /// trl or none.
    pub preset: String,
    /// Seed of everything random.
    pub seed: u64,
    /// Number of steps.
    pub total_steps: u64,
    /// Steps in one pass over the data.
    pub steps_per_epoch: u64,
    /// SHA-256 of the held-out rows, if there are any.
    pub eval_data: Option<String>,
    /// Tokens after which a held-out row is cut.
    pub eval_max_length: Option<usize>,
    /// Steps from one evaluation to the next.
    pub eval_every: Option<u64>,
    /// Evaluations without improvement that end the run.
    pub early_stop_patience: Option<u64>,
    /// Whether the result is the adapter of the best evaluation.
    pub load_best: bool,
    /// Parts that the trainer needs as types, not as text.
    #[serde(skip)]
    pub typed: Typed,
}

/// Steps of a run, at most: every epoch's order and KL partners are drawn before the first step.
const MOST_STEPS: u64 = 1_000_000_000;

/// The plan's enumerations.
#[derive(Clone, Debug)]
pub struct Typed {
    /// The loss.
    pub loss: LossSpec,
    /// The schedule.
    pub schedule: ScheduleKind,
    /// The optimizer.
    pub optimizer: OptimizerSpec,
    /// The adapter's settings.
    pub adapter: AdapterConfig,
    /// What a fresh adapter looks like.
    pub layout: Option<LoraLayout>,
    /// Tensors of the base that are trained whole.
    pub whole: Shapes,
    /// Whether TRL's order is asked for.
    pub trl: bool,
    /// Whether the reference is the initial adapter.
    pub reference_is_adapter: bool,
    /// As the user named it.
    pub model: PathBuf,
    /// Its files when `base_weights` was found.
    pub base_files: Vec<FileStamp>,
}

/// The checked inputs of a plan.
pub struct Inputs<'a> {
    /// The base.
    pub model: &'a ModelDir,
    /// Its sizes.
    pub architecture: &'a Architecture,
    /// The rows.
    pub tokens: &'a TokenSet,
    /// The initial adapter.
    pub adapter: Option<&'a Adapter>,
    /// The held-out rows.
    pub held_out: Option<&'a HeldOut>,
}

impl Plan {
    /// Resolves the arguments. `steps_per_epoch` comes from the order of the data.
    /// Errors: flags that contradict each other (2), data or adapter of another model (65, 78).
    pub fn resolve(args: &Args, inputs: &Inputs, steps_per_epoch: u64, compute: String) -> Result<Self> {
        check_fit(args, inputs)?;
        let (batch, micro) = batches(args)?;
        let adapter::Resolved { config, layout, whole } = adapter::resolve(args, inputs)?;
        let loss = match args.loss {
            LossKind::Kto => Loss::Kto,
            LossKind::ApoZero => Loss::ApoZero,
            LossKind::Sft => Loss::Sft,
        };
        let wanted = (args.epochs * steps_per_epoch as f64).ceil().max(1.0) as u64;
        let total_steps = args.max_steps.unwrap_or(wanted);
        if total_steps > MOST_STEPS {
            return Err(Error::usage(format!("{total_steps} steps are more than {MOST_STEPS}"))
                .with_hint("a smaller --epochs or --max-steps"));
        }
        let ratio = (args.warmup_ratio * total_steps as f64).ceil() as u64;
        let kept = |field: &str| config.kept.get(field).cloned();
        Ok(Self {
            base: inputs.model.fingerprint(),
            base_weights: None,
            data: inputs.tokens.fingerprint(),
            rows: inputs.tokens.len(),
            max_length: inputs.tokens.meta.max_length as usize,
            init_adapter: inputs.adapter.map_or("fresh".into(), Adapter::fingerprint),
            reference: value_name(args.reference),
            lora_r: config.r,
            lora_alpha: config.lora_alpha,
            use_rslora: config.use_rslora,
            lora_dropout: config.lora_dropout,
            use_dora: config.use_dora,
            target_modules: config.target_modules.clone(),
            exclude_modules: kept("exclude_modules"),
            layers_to_transform: kept("layers_to_transform"),
            layers_pattern: kept("layers_pattern"),
            rank_pattern: kept("rank_pattern"),
            alpha_pattern: kept("alpha_pattern"),
            modules_to_save: kept("modules_to_save"),
            bias: kept("bias"),
            init_lora_weights: kept("init_lora_weights"),
            loss: value_name(args.loss),
            beta: args.beta,
            desirable_weight: args.desirable_weight,
            undesirable_weight: args.undesirable_weight,
            lr: args.lr,
            schedule: value_name(args.schedule),
            warmup_steps: if args.warmup_steps > 0 { args.warmup_steps } else { ratio },
            optimizer: value_name(args.optimizer),
            adam_beta1: args.adam_beta1,
            adam_beta2: args.adam_beta2,
            adam_epsilon: args.adam_epsilon,
            weight_decay: args.weight_decay,
            max_grad_norm: args.max_grad_norm,
            compute,
            batch,
            micro_batch: micro,
            preset: args.preset.map_or("none".into(), value_name),
            seed: args.seed,
            total_steps,
            steps_per_epoch,
            eval_data: inputs.held_out.map(|h| h.tokens.fingerprint()),
            eval_max_length: inputs.held_out.map(HeldOut::max_length),
            eval_every: inputs.held_out.map(|_| args.eval_every.unwrap_or(steps_per_epoch)),
            early_stop_patience: args.early_stop_patience,
            load_best: args.load_best,
            typed: Typed {
                loss: LossSpec {
                    loss,
                    beta: args.beta,
                    desirable_weight: args.desirable_weight,
                    undesirable_weight: args.undesirable_weight,
                },
                schedule: args.schedule,
                optimizer: optimizer(args),
                adapter: config,
                layout,
                whole,
                trl: args.preset == Some(Preset::Trl),
                reference_is_adapter: args.reference == ReferenceKind::InitAdapter,
                model: args.model.clone(),
                base_files: Vec::new(),
            },
        })
    }
}

impl Plan {
    /// Takes in what is known of the base's weights.
    pub fn note_weights(&mut self, weights: Weights) {
        self.base_weights = Some(weights.sha256);
        self.typed.base_files = weights.files;
    }

    /// Returns how rows become packs of about `rows` rows.
    pub fn packing(&self, rows: usize) -> Packing {
        if self.lora_dropout > 0.0 { Packing::Single } else { Packing::Shared(rows) }
    }

    /// Returns whether an evaluation follows step `step`.
    pub fn evaluates_after(&self, step: u64) -> bool {
        let due = |n: u64| step.is_multiple_of(n) || step == self.total_steps;
        step > 0 && self.eval_every.is_some_and(due)
    }

    /// Returns whether `waited` evaluations without improvement end the run.
    pub fn stops_after(&self, waited: u64) -> bool {
        self.early_stop_patience.is_some_and(|patience| waited >= patience)
    }
}

/// Returns what a plan that does not name `field` did: the field is newer than the run. Null for a field that all plans have, nothing
/// for one of which nobody knows.
pub fn before(field: &str) -> Option<Value> {
    Some(match field {
        "base_weights" => return None,
        "optimizer" => json!("adamw"),
        "adam_beta1" => json!(0.9),
        "adam_beta2" => json!(0.999),
        "adam_epsilon" => json!(1e-8),
        "load_best" | "use_dora" => json!(false),
        "compute" => json!("cpu f32"),
        _ => Value::Null,
    })
}

fn optimizer(args: &Args) -> OptimizerSpec {
    OptimizerSpec {
        kind: args.optimizer,
        beta1: args.adam_beta1,
        beta2: args.adam_beta2,
        epsilon: args.adam_epsilon,
        weight_decay: args.weight_decay,
        max_grad_norm: args.max_grad_norm,
    }
}

/// Returns (rows per step, rows per KL block).
pub fn batches(args: &Args) -> Result<(usize, usize)> {
    let batch = args.batch as usize;
    match (args.preset, args.micro_batch) {
        (None, Some(_)) => Err(Error::usage(
            "--micro-batch (per_device_train_batch_size) has a meaning with --preset trl only",
        )
        .with_hint(
            "without it the KL estimate is taken over the whole --batch and nothing depends on a micro-batch",
        )),
        (None, None) => Ok((batch, batch)),
        (Some(Preset::Trl), micro) => {
            let micro = micro.map_or(batch, |m| m as usize);
            if !batch.is_multiple_of(micro) {
                return Err(Error::usage(format!("--micro-batch {micro} does not divide --batch {batch}")));
            }
            if micro < 2 && args.loss == LossKind::Kto {
                return Err(Error::usage("TRL's KL pairs need at least 2 rows in a block")
                    .with_hint("--micro-batch 2 or more; without --preset trl any --batch works"));
            }
            Ok((batch, micro))
        }
    }
}

fn check_fit(args: &Args, inputs: &Inputs) -> Result<()> {
    let meta = &inputs.tokens.meta;
    if inputs.tokens.is_empty() {
        return Err(Error::data("the token file has no rows")
            .with_hint("kto-tokenize says how many rows it dropped and why"));
    }
    if args.reference == ReferenceKind::InitAdapter && inputs.adapter.is_none() {
        return Err(Error::usage("--reference init-adapter needs --init-adapter"));
    }
    if args.lora_dropout > 0.0 && args.preset == Some(Preset::Trl) {
        return Err(Error::usage("--preset trl trains without dropout, as TRL does (disable_dropout)"));
    }
    if args.force_base {
        return Ok(());
    }
    fit::check_tokenizer(inputs.model, meta)?;
    if let Some(held_out) = inputs.held_out {
        fit::check_tokenizer(inputs.model, &held_out.tokens.meta).at("--eval-data")?;
    }
    inputs.adapter.map_or(Ok(()), |a| fit::check_adapter(inputs.model, a, "--init-adapter"))
}

fn value_name(value: impl clap::ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string())
}
