//! The loss that is reported: flags first, then the plan of the run that the adapter lies in, then defaults.
//!
//! Rewards are beta times a log-ratio: scored with another beta than it was trained with, an adapter's loss and rewards
//! would be other numbers than those of its metrics.

use crate::{
    args::{LossKind, ScoreArgs},
    models::shown,
};
use clap::ValueEnum;
use kto_cli::{Error, Result, Ui, input};
use kto_formats::adapter::directory;
use kto_model::loss::{Loss, LossSpec};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Largest run.json that is read, in bytes.
const CAP: u64 = 16 << 20;

/// Returns the loss. Error 65: a run.json of kto-train with a value that cannot be.
pub fn loss(args: &ScoreArgs, ui: &Ui) -> Result<LossSpec> {
    let run = args.model.adapter.as_deref().and_then(|path| RunPlan::find(path, ui));
    let number = |flag: Option<f64>, key: &str, default: f64, least: f64| match (flag, &run) {
        (Some(value), _) => Ok(value),
        (None, Some(run)) => run.number(key, default, least),
        (None, None) => Ok(default),
    };
    let kind = match (args.loss, &run) {
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
        ui.detail(format_args!("loss, beta and weights as in {} where no flag is given", shown(&run.path)));
    }
    Ok(spec)
}

/// The plan in a run.json.
struct RunPlan {
    path: PathBuf,
    plan: Value,
}

impl RunPlan {
    /// Returns the plan of the run directory that an adapter lies in.
    fn find(adapter: &Path, ui: &Ui) -> Option<Self> {
        let path = directory(adapter).canonicalize().ok()?.parent()?.join("run.json");
        if !path.is_file() {
            return None;
        }
        let found: Option<Value> =
            input::read(&path, CAP).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let plan = found.filter(|m| m["tool"] == "kto-train").map(|m| m["plan"].clone());
        match plan.filter(Value::is_object) {
            Some(plan) => Some(Self { path, plan }),
            None => {
                ui.warn(format_args!("{}: not a plan of kto-train, so not used", shown(&path)));
                None
            }
        }
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
        Error::data(format!(
            "{}: \"{key}\" cannot be {}",
            shown(&self.path),
            kto_cli::escape(&value.to_string())
        ))
        .with_hint(format!("--{flag}"))
    }
}
