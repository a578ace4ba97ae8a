//! Scoring a range of rows: one sweep with the policy, one with the reference.

use super::number;
use crate::{
    args::ModelArgs,
    models::{Policy, adapter, shown},
};
use candle_core::DType;
use kto_cli::{Context, Error, Record, Result};
use kto_formats::{
    adapter::{CONFIG, directory},
    model_dir::ModelDir,
    tokens::TokenSet,
};
use kto_model::{
    base::BaseModel,
    buffers::{Workspace, WorkspaceSpec},
    lora::Lora,
    rows::{Batch, Job, Packing},
    sweep::{BranchStats, Sweep},
};
use serde_json::{Map, Value, json};
use std::{ops::Range, path::Path};

/// Rows of a pack, and token rows of one sweep: large enough to fetch a block's weights seldom.
const PACK_ROWS: usize = 2048;
/// Rows of a chunk of logits.
const HEAD_ROWS: usize = 256;
const SWEEP_ROWS: usize = 16384;

/// What rewards are measured against.
pub enum Reference {
    /// The policy itself: nothing to compute.
    Policy,
    /// The policy's base.
    Base,
    /// Another adapter on the same base.
    Adapter(Lora),
    /// Another model.
    Model(Box<BaseModel>),
}

impl Reference {
    /// Opens `--reference`. A directory with adapter_config.json, or a run directory with one, is an adapter, any
    /// other a model.
    pub fn open(path: &Path, policy: &Policy, args: &ModelArgs, positions: usize) -> Result<Self> {
        if path == Path::new("base") {
            return Ok(if policy.lora.is_some() { Self::Base } else { Self::Policy });
        }
        let base = &policy.base;
        if directory(path).join(CONFIG).exists() {
            let lora = adapter(path, "--reference", base.directory(), &base.architecture, args.force_base)?;
            return Ok(Self::Adapter(lora));
        }
        let model = BaseModel::load(ModelDir::open(path)?, DType::F32, positions).at(shown(path))?;
        if model.architecture.vocab_size != base.architecture.vocab_size {
            let (a, b) = (model.architecture.vocab_size, base.architecture.vocab_size);
            return Err(Error::config(format!(
                "--reference {} has a vocabulary of {a}, --model one of {b}",
                shown(path)
            )));
        }
        Ok(Self::Model(Box::new(model)))
    }

    /// Notes what was opened beside the policy's model.
    pub fn note(&self, path: &Path, record: &mut Record) {
        match self {
            Self::Policy | Self::Base => {}
            Self::Adapter(_) => record.directory(&directory(path)),
            Self::Model(model) => record.model(path, || model.directory().fingerprint()),
        }
    }

    /// Returns whether policy and reference are the same.
    pub fn is_policy(&self) -> bool {
        matches!(self, Self::Policy)
    }
}

/// The scores of one row.
#[derive(Clone, Copy, Debug)]
pub struct Score {
    /// Index of the row.
    pub row: usize,
    /// true = desirable
    pub label: bool,
    /// The policy on the row itself.
    pub policy: BranchStats,
    /// Σ log-probability under the reference.
    pub reference_logps: f64,
    /// The mismatched completion, if KL is estimated.
    pub kl: Option<KlScore>,
}

/// The scores of a mismatched completion.
#[derive(Clone, Copy, Debug)]
pub struct KlScore {
    /// Row whose completion it is.
    pub partner: usize,
    /// Σ log-probability under the policy.
    pub logps: f64,
    /// Σ log-probability under the reference.
    pub reference_logps: f64,
}

impl Score {
    /// Returns the row's JSON object. Rows count from 1, as in messages.
    pub fn json(&self, beta: f64) -> Value {
        let mut out = Map::new();
        out.insert("row".into(), json!(self.row + 1));
        out.insert("label".into(), json!(self.label));
        out.insert("tokens".into(), json!(self.policy.tokens));
        let mut put = |key: &str, value: f64| out.insert(key.into(), number(value));
        put("logps", self.policy.logps);
        put("reference_logps", self.reference_logps);
        put("reward", beta * (self.policy.logps - self.reference_logps));
        if let Some(kl) = self.kl {
            out.insert("kl_from".into(), json!(kl.partner + 1));
            let mut put = |key: &str, value: f64| out.insert(key.into(), number(value));
            put("kl_logps", kl.logps);
            put("kl_reference_logps", kl.reference_logps);
            put("kl", kl.logps - kl.reference_logps);
        }
        Value::Object(out)
    }
}

/// The two models and the rows.
pub struct Scorer<'a> {
    /// The model that is judged.
    pub policy: &'a Policy,
    /// What it is measured against.
    pub reference: &'a Reference,
    /// The rows.
    pub tokens: &'a TokenSet,
    /// The KL partner of every row.
    pub partners: Option<&'a [usize]>,
}

impl Scorer<'_> {
    /// Returns where a sweep that begins with row `start` ends (prompts counted for every row: an upper bound).
    pub fn chunk_end(&self, start: usize) -> usize {
        let length = |i: usize| {
            let row = self.tokens.row(i);
            let partner = self.partners.map_or(0, |p| self.tokens.row(p[i]).completion_ids.len());
            row.prompt_ids.len() + row.completion_ids.len() + partner
        };
        let mut rows = 0;
        for i in start..self.tokens.len() {
            rows += length(i);
            if i > start && rows > SWEEP_ROWS {
                return i;
            }
        }
        self.tokens.len()
    }

    /// Scores a range of rows.
    pub fn score(&self, range: Range<usize>) -> Result<Vec<Score>> {
        let n = range.len();
        let main = range.clone().map(|row| Job { prompt: row, completion: row, gradient: false });
        let kl = self.partners.into_iter().flat_map(|partners| {
            let job = |row: usize| Job { prompt: row, completion: partners[row], gradient: false };
            range.clone().map(job)
        });
        let jobs: Vec<Job> = main.chain(kl).collect();
        let base = &self.policy.base;
        let policy = self.sweep(base, self.policy.lora.as_ref(), &jobs)?;
        let reference = match self.reference {
            Reference::Policy => policy.clone(),
            Reference::Base => self.sweep(base, None, &jobs)?,
            Reference::Adapter(lora) => self.sweep(base, Some(lora), &jobs)?,
            Reference::Model(model) => self.sweep(model, None, &jobs)?,
        };
        let score = |row: usize| {
            let at = row - range.start;
            Score {
                row,
                label: self.tokens.row(row).label,
                policy: policy[at],
                reference_logps: reference[at].logps,
                kl: self.partners.map(|p| KlScore {
                    partner: p[row],
                    logps: policy[n + at].logps,
                    reference_logps: reference[n + at].logps,
                }),
            }
        };
        Ok(range.clone().map(score).collect())
    }

    /// Returns what a model says about every job.
    fn sweep(&self, base: &BaseModel, lora: Option<&Lora>, jobs: &[Job]) -> Result<Vec<BranchStats>> {
        let limits = base.architecture.limits(self.tokens.meta.max_length as usize);
        let batch = Batch::new(self.tokens, limits, jobs, Packing::Shared(PACK_ROWS));
        let spec = WorkspaceSpec { head_rows: HEAD_ROWS, ..Default::default() };
        let workspace = Workspace::new(&base.architecture, lora, spec, base.device());
        let sweep = Sweep { base, lora, dropout: None, workspace: &workspace, watch: None };
        Ok(batch.by_job(&sweep.forward(&batch.packs, false)?.branches))
    }
}
