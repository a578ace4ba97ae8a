//! What decides the numbers beside model and rows: flags first, then the plan of the run that the adapter lies in, then defaults.
//!
//! Rewards are beta times a log-ratio: scored with another beta or against another reference than it was trained with, an adapter's loss
//! and rewards would be other numbers than those of its metrics; with other KL partners, its KL.

use crate::{
    args::{LossKind, ScoreArgs},
    models::shown,
};
use clap::ValueEnum;
use kto_cli::{Error, Result, Ui, input};
use kto_formats::{
    adapter::{Adapter, run_of},
    json::short,
    tokens::TokenSet,
};
use kto_model::loss::{Loss, LossSpec};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Largest run.json that is read, in bytes.
const CAP: u64 = 16 << 20;
/// Seed of the KL partners when nobody says.
const SEED: u64 = 42;

/// Returns the loss. Error 65: a run.json of kto-train with a value that cannot be.
pub fn loss(args: &ScoreArgs, run: Option<&RunPlan>, ui: &Ui) -> Result<LossSpec> {
    let number = |flag: Option<f64>, key: &str, default: f64, least: f64| match (flag, run) {
        (Some(value), _) => Ok(value),
        (None, Some(run)) => run.number(key, default, least),
        (None, None) => Ok(default),
    };
    let kind = match (args.loss, run) {
        (Some(kind), _) => kind,
        (None, Some(run)) => run.loss()?,
        (None, None) => LossKind::Kto,
    };
    let spec = LossSpec {
        loss: match kind {
            LossKind::Kto => Loss::Kto,
            LossKind::ApoZero => Loss::ApoZero,
            LossKind::Sft => Loss::Sft,
        },
        beta: number(args.beta, "beta", 0.1, f64::MIN_POSITIVE)?,
        desirable_weight: number(args.desirable_weight, "desirable_weight", 1.0, 0.0)?,
        undesirable_weight: number(args.undesirable_weight, "undesirable_weight", 1.0, 0.0)?,
    };
    if let Some(run) = run {
        let from = shown(&run.path);
        ui.detail(format_args!(
            "loss, beta, weights, seed and reference as in {from} where no flag is given"
        ));
    }
    Ok(spec)
}

/// Returns the seed of the KL partners. Error 65: as of [`loss`].
pub fn seed(args: &ScoreArgs, run: Option<&RunPlan>) -> Result<u64> {
    match (args.seed, run.and_then(|run| Some((run, run.plan.get("seed")?)))) {
        (Some(seed), _) => Ok(seed),
        (None, Some((run, value))) => value.as_u64().ok_or_else(|| run.bad("seed", value)),
        (None, None) => Ok(SEED),
    }
}

/// Returns what rewards are measured against: `base`, or a path. A run's own `--reference init-adapter` is looked for where run.json says, and
/// is taken if it still is the adapter that the run began with; else that is a warning.
pub fn reference(args: &ScoreArgs, run: Option<&RunPlan>, ui: &Ui) -> Result<PathBuf> {
    if let Some(path) = &args.reference {
        return Ok(path.clone());
    }
    if let Some(run) = run.filter(|run| run.plan.get("reference").is_some_and(|r| r == "init-adapter")) {
        match run.initial_adapter() {
            Ok(path) => {
                let text = "rewards are measured against the adapter that the run began with, as in the run";
                ui.note(format_args!("{text}: {}", shown(&path)));
                return Ok(path);
            }
            Err(why) => ui.warn(format_args!(
                "rewards are measured against the base, in the run against the adapter that it began with: {why}; \
                 --reference DIR names it"
            )),
        }
    }
    Ok("base".into())
}

/// The plan in a run.json.
pub struct RunPlan {
    path: PathBuf,
    plan: Value,
    /// What `--init-adapter` was.
    initial: Option<PathBuf>,
}

impl RunPlan {
    /// Returns the plan of the run directory that an adapter lies in.
    pub fn find(adapter: &Path, ui: &Ui) -> Option<Self> {
        let path = run_of(adapter)?.join("run.json");
        if !path.is_file() {
            return None;
        }
        let found: Option<Value> =
            input::read(&path, CAP).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let Some(run) = found.filter(|m| m["tool"] == "kto-train" && m["plan"].is_object()) else {
            ui.warn(format_args!("{}: not a plan of kto-train, so not used", shown(&path)));
            return None;
        };
        let initial = run["configuration"]["init-adapter"].as_str().map(PathBuf::from);
        Some(Self { path, plan: run["plan"].clone(), initial })
    }

    /// Tells where the numbers of the run's own held-out rows are not those of its eval.jsonl.
    pub fn note_micro_batches(&self, tokens: &TokenSet, ui: &Ui) {
        let is = |key: &str, value: &str| self.plan.get(key).is_some_and(|found| found == value);
        if is("preset", "trl") && is("eval_data", &tokens.fingerprint()) {
            ui.note(
                "these are the run's held-out rows: its eval.jsonl has TRL's means of micro-batches, with TRL's KL pairs; \
                 kl, loss and means are over all rows here",
            );
        }
    }

    /// Returns where the adapter is that the run began with; or why it is not to be had.
    fn initial_adapter(&self) -> std::result::Result<PathBuf, String> {
        let Some(path) = &self.initial else { return Err("run.json does not say where that was".into()) };
        // The run may have been started in another directory; the fingerprint tells whether it is the one.
        let run = self.path.parent().unwrap_or(Path::new("."));
        let places = [path.clone(), run.join(path), run.join("..").join(path)];
        let mut why = format!("{} is not there", shown(path));
        for place in places.into_iter().filter(|place| place.exists()) {
            match Adapter::read(&place) {
                Ok(adapter) if self.plan["init_adapter"] == adapter.fingerprint().as_str() => {
                    return Ok(place);
                }
                Ok(_) => why = format!("{} is another one now", shown(&place)),
                Err(e) => why = e.to_string(),
            }
        }
        Err(why)
    }

    fn number(&self, key: &str, default: f64, least: f64) -> Result<f64> {
        match self.plan.get(key) {
            None => Ok(default),
            Some(value) => {
                value.as_f64().filter(|x| x.is_finite() && *x >= least).ok_or_else(|| self.bad(key, value))
            }
        }
    }

    fn loss(&self) -> Result<LossKind> {
        match self.plan.get("loss") {
            None => Ok(LossKind::Kto),
            Some(value) => value
                .as_str()
                .and_then(|name| LossKind::from_str(name, true).ok())
                .ok_or_else(|| self.bad("loss", value)),
        }
    }

    fn bad(&self, key: &str, value: &Value) -> Error {
        let flag = key.replace('_', "-");
        Error::data(format!("{}: \"{key}\" cannot be {}", shown(&self.path), short(value)))
            .with_hint(format!("--{flag}"))
    }
}
