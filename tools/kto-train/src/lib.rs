//! Trains a LoRA adapter with KTO: arguments → checked inputs → plan → run directory.
//!
//! Never tokenizes and writes only inside `--out`.

#![forbid(unsafe_code)]

mod args;
mod checkpoint;
mod data;
mod dry_run;
mod memory;
pub mod metrics;
pub mod optimizer;
pub mod order;
mod pace;
pub mod plan;
mod reference;
mod run_dir;
mod run_log;
pub mod schedule;
pub mod step;
mod train;
mod unchanged;

pub use args::{Args, LossKind, Preset, ReferenceKind, ScheduleKind};

use candle_core::DType;
use kto_cli::{Context, Error, Exit, Kind, Result, Ui, escape, output, signal};
use kto_formats::{adapter::Adapter, model_dir::ModelDir, tokens::TokenSet};
use kto_model::{
    architecture::Architecture,
    base::BaseModel,
    lora::{Lora, LoraSpec},
    memory::MemoryPlan,
    weights,
};
use memory::Fit;
use order::Order;
use plan::{Inputs, Plan};
use run_dir::{Existing, RunDir};
use std::path::Path;
use unchanged::Verdict;

/// Runs the tool.
pub fn run(mut args: Args, ui: &Ui) -> Result<Exit> {
    signal::install();
    let (_, micro) = plan::batches(&args)?;
    if !args.dry_run {
        run_dir::check_lock(&args.out)?;
        let existing = if args.common.make.if_changed { Existing::Resume } else { existing(&args) };
        run_dir::check(&args.out, existing)?;
        run_dir::check_inputs(&args)?;
        unchanged::check(&args)?;
    }
    set_threads(args.threads)?;
    let model = ModelDir::open(&args.model)?;
    let architecture = Architecture::from_config(&model.config).at(shown(&args.model))?;
    weights::check(&architecture, &model).at(shown(&args.model))?;
    let adapter = args.init_adapter.as_deref().map(Adapter::read).transpose()?;
    let tokens = data::read(&args)?;
    let order = order(&args, &tokens, micro)?;
    let inputs =
        Inputs { model: &model, architecture: &architecture, tokens: &tokens, adapter: adapter.as_ref() };
    let plan = Plan::resolve(&args, &inputs, order.steps_per_epoch())?;
    match unchanged::verdict(&args, &plan)? {
        Verdict::Done => return unchanged::done(&args, &plan),
        Verdict::Replace => args.resume = false,
        Verdict::GoOn => {}
    }
    data::report(&plan, &architecture, &tokens, ui);
    data::check_ids(&architecture, &tokens)?;
    let fit = Fit::new(&args, &plan, &inputs, &order)?;
    // Nothing of the run's size exists before the plan has been found to fit.
    let lora = if fit.fits() { Some(initial(&plan, &inputs)?) } else { None };
    if args.dry_run {
        dry_run::print(&plan, &inputs, &fit)?;
    }
    fit.check(&model)?;
    drop(adapter);
    let Some(lora) = lora.filter(|_| !args.dry_run) else { return Ok(Exit::Ok) };
    fit.report(ui);
    train(&args, Planned { plan: &plan, memory: &fit.plan }, model, &tokens, &order, &lora, ui)
}

/// What will be done, and in how much memory.
#[derive(Clone, Copy)]
struct Planned<'a> {
    plan: &'a Plan,
    memory: &'a MemoryPlan,
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
    match inputs.adapter {
        Some(adapter) => Lora::from_adapter(inputs.architecture, adapter, DType::F32).at("--init-adapter"),
        None => {
            let modules = plan.typed.modules.clone();
            let spec = LoraSpec { rank: plan.lora_r, alpha: plan.lora_alpha, modules };
            Lora::fresh(inputs.architecture, &spec, plan.seed, DType::F32)
        }
    }
}

fn train(
    args: &Args,
    planned: Planned,
    model: ModelDir,
    tokens: &TokenSet,
    order: &Order,
    lora: &Lora,
    ui: &Ui,
) -> Result<Exit> {
    let Planned { plan, memory } = planned;
    let mut base = BaseModel::load(model, DType::F32, data::positions(tokens)).at(shown(&args.model))?;
    base.set_streaming(memory.stream);
    let dir = open_run(args, plan)?.with_record(unchanged::record(args, plan));
    if args.resume && dir.is_finished() {
        ui.note(format_args!("{}: the run is finished", shown(&args.out)));
    } else {
        data::spool(args, &dir, tokens)?;
        let checkpoint_every = args.checkpoint_every;
        let run = train::Run { plan, memory, base: &base, tokens, order, dir: &dir, checkpoint_every, ui };
        let summary = run.train(lora, args.resume)?;
        ui.note(format_args!("{summary}; adapter in {}", shown(&dir.file("adapter"))));
    }
    dir.finish()?;
    output::print_path(&args.out)?;
    Ok(Exit::Ok)
}

fn existing(args: &Args) -> Existing {
    match (args.resume, args.force) {
        (true, _) => Existing::Resume,
        (false, true) => Existing::Replace,
        (false, false) => Existing::Refuse,
    }
}

/// Locks the run directory; with --resume proves that the stored plan is this one.
fn open_run(args: &Args, plan: &Plan) -> Result<RunDir> {
    let dir = RunDir::open(&args.out, existing(args))?;
    let stored = dir.stored_plan();
    if args.resume && stored.is_none() && dir.file("checkpoints").exists() {
        let text = "checkpoints, but no readable run.json that says what they are of";
        return Err(Error::config(format!("{}: {text}", shown(&args.out)))
            .with_hint("--force to start anew in this directory"));
    }
    if let Some(stored) = stored.filter(|_| args.resume) {
        let differences = run_dir::differences(&stored, plan);
        if !differences.is_empty() {
            let text: Vec<String> =
                differences.iter().map(|(f, old, new)| format!("{f} was {old}, is {new}")).collect();
            return Err(Error::config(format!("{}: cannot resume: {}", shown(&args.out), text.join("; ")))
                .with_hint("give the run's own flags and files, or start anew with another --out"));
        }
    }
    Ok(dir)
}

fn set_threads(threads: Option<u32>) -> Result<()> {
    let Some(n) = threads else { return Ok(()) };
    let built = rayon::ThreadPoolBuilder::new().num_threads(n as usize).build_global();
    built.map_err(|e| Error::new(Kind::Internal, format!("--threads {n}: {e}")))
}

fn shown(path: &Path) -> String {
    escape(&path.display().to_string())
}
