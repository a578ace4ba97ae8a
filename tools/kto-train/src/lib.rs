//! Trains a LoRA adapter with KTO: arguments → checked inputs → plan → run directory.
//!
//! Never tokenizes and writes only inside `--out`.

mod args;
mod checkpoint;
mod dry_run;
pub mod metrics;
pub mod optimizer;
pub mod order;
pub mod plan;
mod run_dir;
pub mod schedule;
pub mod step;
mod train;

pub use args::{Args, LossKind, Preset, ReferenceKind, ScheduleKind};

use candle_core::DType;
use kto_cli::{Context, Error, Exit, Kind, Result, Ui, atomic, input, output, signal};
use kto_formats::{adapter::Adapter, model_dir::ModelDir, tokens::TokenSet};
use kto_model::{
    architecture::Architecture,
    base::BaseModel,
    lora::{Lora, LoraSpec},
};
use order::Order;
use plan::{Inputs, Plan};
use run_dir::{Existing, RunDir};
use std::path::Path;

/// Name of the copy of piped data in the run directory.
const SPOOL: &str = "data.kto.arrow";

/// Runs the tool.
pub fn run(args: Args, ui: &Ui) -> Result<Exit> {
    signal::install();
    let (_, micro) = plan::batches(&args)?;
    set_threads(args.threads)?;
    let model = ModelDir::open(&args.model)?;
    let architecture = Architecture::from_config(&model.config).at(shown(&args.model))?;
    let adapter = args.init_adapter.as_deref().map(Adapter::read).transpose()?;
    let tokens = read_tokens(&args)?;
    let order = match args.preset {
        Some(Preset::Trl) => Order::trl(tokens.len(), args.batch as usize, micro),
        None => Order::shuffled(
            &tokens,
            args.batch as usize,
            args.seed,
            args.loss == LossKind::Kto && !tokens.is_empty(),
        )?,
    };
    let inputs =
        Inputs { model: &model, architecture: &architecture, tokens: &tokens, adapter: adapter.as_ref() };
    let plan = Plan::resolve(&args, &inputs, order.steps_per_epoch())?;
    report_data(&plan, &tokens, ui);
    let lora = match &adapter {
        Some(adapter) => {
            Lora::from_adapter(&architecture, adapter, DType::F32).at(shown_option(&args.init_adapter))?
        }
        None => {
            let spec =
                LoraSpec { rank: plan.lora_r, alpha: plan.lora_alpha, modules: plan.typed.modules.clone() };
            Lora::fresh(&architecture, &spec, plan.seed, DType::F32)?
        }
    };
    if args.dry_run {
        check_ids(&architecture, &tokens)?;
        return dry_run::print(&plan, &inputs, &lora);
    }
    let base = BaseModel::load(model, DType::F32, plan.max_length).at(shown(&args.model))?;
    check_ids(&base.architecture, &tokens)?;
    let dir = open_run(&args, &plan)?;
    if args.data == Path::new("-") {
        spool(&dir, &tokens)?;
    }
    let checkpoint_every = args.checkpoint_every;
    let run = train::Run {
        plan: &plan,
        base: &base,
        tokens: &tokens,
        order: &order,
        dir: &dir,
        checkpoint_every,
        ui,
    };
    run.train(&lora, args.resume)?;
    ui.note(format_args!("{} steps done, adapter in {}", plan.total_steps, shown(&dir.file("adapter"))));
    output::print_path(&args.out)?;
    Ok(Exit::Ok)
}

/// Locks the run directory; with --resume proves that the stored plan is this one.
fn open_run(args: &Args, plan: &Plan) -> Result<RunDir> {
    let existing = match (args.resume, args.force) {
        (true, _) => Existing::Resume,
        (false, true) => Existing::Replace,
        (false, false) => Existing::Refuse,
    };
    let dir = RunDir::open(&args.out, existing)?;
    if let Some(stored) = dir.stored_plan().filter(|_| args.resume) {
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

/// Reads the token file, standard input, or on --resume the copy of it.
fn read_tokens(args: &Args) -> Result<TokenSet> {
    let spooled = args.out.join(SPOOL);
    let resumed = args.resume && args.data == Path::new("-") && spooled.exists();
    let paths = if resumed { vec![spooled] } else { input::or_stdin(std::slice::from_ref(&args.data))? };
    let input = input::open(&paths[0])?;
    TokenSet::read(&input.name, input.reader)
}

fn spool(dir: &RunDir, tokens: &TokenSet) -> Result<()> {
    let path = dir.file(SPOOL);
    let mut file = atomic::AtomicFile::create(&path)?;
    tokens.write(&mut file).map_err(|e| Error::writing(&path, &e))?;
    file.commit()
}

fn check_ids(architecture: &Architecture, tokens: &TokenSet) -> Result<()> {
    let vocab = architecture.vocab_size;
    for (i, row) in tokens.rows().enumerate() {
        let ids = row.prompt_ids.iter().chain(row.completion_ids);
        if let Some(id) = ids.into_iter().find(|id| **id as usize >= vocab) {
            return Err(Error::data(format!(
                "row {}: token id {id} is outside the model's vocabulary of {vocab}",
                i + 1
            ))
            .with_hint("kto-tokenize --model with this model"));
        }
    }
    Ok(())
}

/// Says what KTO users want to know about their data before hours of training.
fn report_data(plan: &Plan, tokens: &TokenSet, ui: &Ui) {
    let desirable = tokens.rows().filter(|r| r.label).count();
    let undesirable = tokens.len() - desirable;
    let meta = &tokens.meta;
    ui.note(format_args!(
        "{} rows ({desirable} desirable, {undesirable} undesirable; {} cut, {} dropped by kto-tokenize), {} steps",
        tokens.len(),
        meta.truncated,
        meta.dropped,
        plan.total_steps
    ));
    if plan.loss != "sft" && (desirable == 0 || undesirable == 0) {
        ui.warn("all rows have one label: KTO learns from the difference between the two");
    } else if plan.loss != "sft" {
        // Equation 8 of the paper: λD·nD / (λU·nU) in [1, 4/3].
        let ratio = plan.desirable_weight * desirable as f64 / (plan.undesirable_weight * undesirable as f64);
        if !(0.995..=1.34).contains(&ratio) {
            let advice = plan.undesirable_weight * undesirable as f64 / desirable as f64;
            ui.warn(format_args!(
                "desirable and undesirable rows weigh {ratio:.2} to 1; the KTO paper advises 1 to 1.33: --desirable-weight {advice:.2} to {:.2}",
                advice * 4.0 / 3.0
            ));
        }
    }
}

fn set_threads(threads: Option<u32>) -> Result<()> {
    let Some(n) = threads else { return Ok(()) };
    let built = rayon::ThreadPoolBuilder::new().num_threads(n as usize).build_global();
    built.map_err(|e| Error::new(Kind::Internal, format!("--threads {n}: {e}")))
}

fn shown(path: &Path) -> String {
    kto_cli::escape(&path.display().to_string())
}

fn shown_option(path: &Option<std::path::PathBuf>) -> String {
    path.as_deref().map_or_else(String::new, shown)
}
