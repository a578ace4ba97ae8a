//! Trains a LoRA adapter with KTO: arguments → checked inputs → plan → run directory.
//!
//! Never tokenizes and writes only inside `--out`.

#![forbid(unsafe_code)]

mod adapter;
mod args;
mod cadence;
mod checkpoint;
mod data;
mod device;
mod dry_run;
mod evaluation;
mod logs;
mod memory;
pub mod metrics;
mod nonfinite;
pub mod optimizer;
pub mod order;
mod pace;
pub mod plan;
mod reference;
mod resume;
mod run_dir;
mod run_log;
pub mod schedule;
pub mod step;
mod steps;
mod stored;
mod train;
mod unchanged;
mod weights;

pub use args::{
    Args, BiasKind, InitKind, LossKind, OnNonfinite, OptimizerKind, Preset, ReferenceKind, ScheduleKind,
};
pub use cadence::Every;
pub use resume::Resume;

use cadence::{Cadence, Keep};
use candle_core::DType;
use device::RunDevice;
use evaluation::HeldOut;
use kto_cli::{Context, Error, Exit, Kind, Result, Ui, escape, lock::RunLock, output, signal};
use kto_formats::{adapter::Adapter, model_dir::ModelDir, tokens::TokenSet};
use kto_hub::Need;
use kto_kernels::device::Device;
use kto_model::{architecture::Architecture, base::BaseModel, lora::Lora, memory::MemoryPlan, whole};
use memory::Fit;
use order::Order;
use plan::{Inputs, Plan};
use run_dir::{Existing, RunDir};
use std::{path::Path, time::Instant};
use stored::Stored;
use train::Ended;
use unchanged::Verdict;
use weights::Weights;

/// Runs the tool.
pub fn run(mut args: Args, ui: &Ui) -> Result<Exit> {
    let began = Instant::now();
    if args.check_device {
        return device::check();
    }
    signal::install();
    let (_, micro) = plan::batches(&args)?;
    if let Some(Resume::From(path)) = &args.resume {
        resume::peek(path)?;
    }
    let lock = claim(&args, ui)?;
    set_threads(args.threads)?;
    args.model_dir = kto_hub::locate(&args.model, &Need::Weights(known), ui)?;
    let model = ModelDir::open(&args.model_dir)?;
    model.notes.iter().for_each(|note| ui.warn(note));
    let architecture = Architecture::from_config(&model.config).at(shown(&args.model))?;
    kto_model::weights::check(&architecture, &model).at(shown(&args.model))?;
    if let Some(text) = kto_model::weights::unused(&architecture, &model) {
        ui.warn(format_args!("{}: {text}", shown(&args.model)));
    }
    let adapter = args.init_adapter.as_deref().map(Adapter::read).transpose()?;
    let tokens = data::read(&args)?;
    let held_out = HeldOut::read(&args, micro)?;
    let order = order(&args, &tokens, micro)?;
    let inputs = Inputs {
        model: &model,
        architecture: &architecture,
        tokens: &tokens,
        adapter: adapter.as_ref(),
        held_out: held_out.as_ref(),
    };
    let device = RunDevice::choose(&args)?;
    let mut plan = Plan::resolve(&args, &inputs, order.steps_per_epoch(), device.name())?;
    device.check(&plan)?;
    // A dry run ends as the real one would: what that goes on with is looked at now.
    if args.common.make.if_changed || (args.dry_run && args.resume.is_some()) {
        plan.note_weights(Weights::of(&model, &args, ui)?);
    }
    let replaces = args.common.make.if_changed && args.force;
    if args.dry_run && !replaces {
        check_resume(&args, &plan)?;
    }
    match unchanged::verdict(&args, &plan)? {
        Verdict::Done => return unchanged::done(&args, &plan),
        Verdict::Replace => args.resume = None,
        Verdict::GoOn => {}
    }
    data::report(&plan, &architecture, &tokens, ui);
    if whole::unties(&architecture, plan.typed.whole.keys()) {
        ui.warn(TIE);
    }
    if let Some(bias) = plan.bias.as_ref().filter(|_| !plan.typed.whole.keys().any(|n| n.ends_with(".bias")))
    {
        let whose = if bias == "all" { "the model has" } else { "the adapted layers have" };
        ui.warn(format_args!("--bias: {whose} no biases, so none are trained"));
    }
    data::check_ids(&architecture, &tokens)?;
    held_out.as_ref().map_or(Ok(()), |h| h.check_ids(&architecture))?;
    let fit = Fit::new(&args, &plan, &inputs, &order, &device)?;
    // Nothing of the run's size exists before the plan has been found to fit.
    let lora = if fit.fits() { Some(initial(&plan, &inputs)?) } else { None };
    if args.dry_run {
        dry_run::print(&plan, &inputs, &fit)?;
    }
    fit.check(&model)?;
    drop(adapter);
    let Some(lora) = lora.filter(|_| !args.dry_run) else { return Ok(Exit::Ok) };
    fit.report(ui);
    // As late as can be: what is refused is refused at once.
    if plan.base_weights.is_none() {
        plan.note_weights(Weights::of(&model, &args, ui)?);
    }
    let planned = Planned {
        args: &args,
        plan: &plan,
        memory: &fit.plan,
        device: fit.device(&device),
        tokens: &tokens,
        held_out: held_out.as_ref(),
        order: &order,
        began,
    };
    planned.train(model, &lora, lock, ui)
}

/// As PEFT has it where ensure_weight_tying is false.
const TIE: &str = "the model's head is its embedding; with --modules-to-save they are two matrices from now on, as in PEFT, also once merged";

/// Refuses what the run directory does not allow, before the model is loaded. Returns the lock of one that is there already, of which
/// a dry run needs none: it writes nothing.
fn claim(args: &Args, ui: &Ui) -> Result<Option<RunLock>> {
    let wait = args.wait.unwrap_or_default();
    let lock = match args.out.is_dir() && !args.dry_run {
        true => Some(run_dir::lock(&args.out, wait, ui)?),
        false => None,
    };
    let (existing, if_changed) = (existing(args), args.common.make.if_changed);
    run_dir::check(&args.out, if if_changed { Existing::Resume } else { existing })?;
    // Whether --if-changed replaces the run is known only when its plan is.
    let may_replace = existing == Existing::Replace || (if_changed && args.force);
    run_dir::check_inputs(args, if may_replace { Existing::Replace } else { existing })?;
    data::check_spool(args)?;
    if !args.dry_run {
        unchanged::check(args)?;
    }
    Ok(lock)
}

/// Refuses a configuration that cannot be trained, before its weights are fetched.
fn known(config: &serde_json::Value) -> Result<()> {
    Architecture::from_config(config).map(drop)
}

/// Returns which rows make which step.
fn order(args: &Args, tokens: &TokenSet, micro: usize) -> Result<Order> {
    let batch = args.batch as usize;
    match args.preset {
        Some(Preset::Trl) => Ok(Order::trl(tokens.len(), batch, micro)),
        // An empty file is named by the plan's check.
        None => Order::shuffled(tokens, batch, args.seed, args.loss == LossKind::Kto && !tokens.is_empty()),
    }
}

/// Returns the adapter that training starts from.
fn initial(plan: &Plan, inputs: &Inputs) -> Result<Lora> {
    match (inputs.adapter, &plan.typed.layout) {
        (Some(adapter), _) => {
            Lora::from_adapter(inputs.architecture, adapter, DType::F32).at("--init-adapter")
        }
        (None, Some(layout)) => Lora::laid_out(inputs.architecture, layout, plan.seed, DType::F32),
        (None, None) => Err(Error::internal("neither a given nor a fresh adapter")),
    }
}

/// What will be done, with what, and in how much memory.
struct Planned<'a> {
    args: &'a Args,
    plan: &'a Plan,
    memory: &'a MemoryPlan,
    /// A GPU, if it computes on one.
    device: Option<Device>,
    tokens: &'a TokenSet,
    held_out: Option<&'a HeldOut>,
    order: &'a Order,
    began: Instant,
}

impl Planned<'_> {
    fn train(&self, model: ModelDir, lora: &Lora, lock: Option<RunLock>, ui: &Ui) -> Result<Exit> {
        let Planned { args, plan, memory, ref device, tokens, held_out, order, .. } = *self;
        let positions = data::positions(tokens).max(held_out.map_or(0, |h| data::positions(&h.tokens)));
        let mut base = BaseModel::load(model, DType::F32, positions).at(shown(&args.model))?;
        if plan.typed.layout.is_some() {
            lora.fill(&base)?;
            if plan.use_dora {
                ui.detail(format_args!("measuring the rows of adapted weights"));
                lora.measure(&base)?;
            }
        }
        match (device, &memory.on_gpu) {
            (Some(device), Some(on_gpu)) => {
                ui.detail(format_args!("uploading weights to the GPU"));
                base.place(device, on_gpu.placement, |_| {}).at(shown(&args.model))?;
            }
            _ => base.set_streaming(memory.stream),
        }
        let lock = |path: &Path| match lock {
            Some(lock) => Ok(lock),
            None => run_dir::lock(path, args.wait.unwrap_or_default(), ui),
        };
        let dir = open_run(args, plan, lock)?.with_record(unchanged::record(args, plan));
        let stored = dir.stored().filter(|_| args.resume.is_some());
        if stored.as_ref().and_then(Stored::pack_rows).is_some_and(|rows| rows != memory.pack_rows) {
            // Another process has begun the run since the memory was planned.
            let text = format!("{}: the run has only just begun elsewhere", shown(&args.out));
            return Err(Error::new(Kind::TryAgain, text).with_hint("the same command again"));
        }
        let goes_back = matches!(args.resume, Some(Resume::From(_)));
        if !goes_back && stored.is_some_and(|stored| stored.is_finished()) {
            ui.note(format_args!("{}: the run is finished", shown(&args.out)));
            dir.finish()?;
            output::print_path(&args.out)?;
            return Ok(Exit::Ok);
        }
        let keep = Keep { last: args.keep_last as usize, every: args.keep_every };
        let cadence = Cadence::new(args.checkpoint_every, keep, self.began, args.max_time);
        let skip = args.on_nonfinite == OnNonfinite::Skip;
        let base = &base;
        let dir = &dir;
        let piped = data::is_piped(args);
        let run = train::Run { plan, memory, base, tokens, piped, held_out, order, dir, cadence, skip, ui };
        match run.train(lora, args.resume.as_ref())? {
            Ended::Finished(summary) => {
                ui.note(format_args!("{summary}; adapter in {}", shown(&dir.file("adapter"))));
                dir.finish()?;
                output::print_path(&args.out)?;
            }
            // No path on standard output: there is no result yet that a pipe could go on with.
            Ended::Paused(summary) => {
                ui.note(format_args!("{summary}; --max-time is over, not finished: go on with --resume"));
            }
        }
        Ok(Exit::Ok)
    }
}

fn existing(args: &Args) -> Existing {
    let begins = resume::foreign(&args.out, args.resume.as_ref()).is_some();
    match (args.resume.is_some() && !begins, args.force) {
        (true, _) => Existing::Resume,
        (false, true) => Existing::Replace,
        (false, false) => Existing::Refuse,
    }
}

/// Locks the run directory; with --resume proves that the plan of what is gone on with is this one.
fn open_run(args: &Args, plan: &Plan, lock: impl FnOnce(&Path) -> Result<RunLock>) -> Result<RunDir> {
    // Of a checkpoint that is named all is looked at before --force removes anything; what stands in --out, under its lock.
    check_named(args, plan)?;
    let dir = RunDir::open(&args.out, existing(args), lock)?;
    check_stored(args, plan)?;
    Ok(dir)
}

/// Refuses (78) on --resume what has another plan than this one.
fn check_resume(args: &Args, plan: &Plan) -> Result<()> {
    check_named(args, plan)?;
    check_stored(args, plan)
}

fn check_named(args: &Args, plan: &Plan) -> Result<()> {
    let Some(Resume::From(path)) = &args.resume else { return Ok(()) };
    let manifest = resume::peek(path)?;
    run_dir::refuse_differences(&manifest.plan, plan).at(shown(path))?;
    manifest.verify(path).at(shown(path)).map_err(resume::refused)
}

fn check_stored(args: &Args, plan: &Plan) -> Result<()> {
    if existing(args) != Existing::Resume {
        return Ok(());
    }
    let stored = Stored::read(&args.out);
    if let Some(from) = stored.as_ref().and_then(Stored::copied_from) {
        let text = "a run that was killed before it had copied the checkpoint that it begins from";
        return Err(Error::config(format!("{}: {text}", shown(&args.out)))
            .with_hint(format!("--resume={}", escape(from))));
    }
    let stored = stored.as_ref().and_then(Stored::plan);
    if stored.is_none() && run_dir::checkpoints(&args.out).exists() {
        let text = "checkpoints, but no readable run.json that says what they are of";
        return Err(Error::config(format!("{}: {text}", shown(&args.out))).with_hint(
            "--out with a new directory and --resume=DIR goes on from one of them; --force here removes them",
        ));
    }
    stored.map_or(Ok(()), |stored| run_dir::refuse_differences(stored, plan)).at(shown(&args.out))
}

fn set_threads(threads: Option<u32>) -> Result<()> {
    // Not left to the first use, which would panic where no thread can be started. 0: as many as there are cores.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.map_or(0, |n| n as usize));
    pool.build_global().map_err(Error::threads)
}

fn shown(path: &Path) -> String {
    escape(&path.display().to_string())
}
