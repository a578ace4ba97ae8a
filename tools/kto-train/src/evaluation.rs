//! The held-out file: its rows, their KL partners, and what an evaluation of them says.
//!
//! Evaluations change nothing of the training. Their partners are drawn once, so that losses of different steps can be compared, and
//! their references are cached as the training rows' are.

use crate::{
    args::{Args, LossKind, Preset},
    data,
    order::{Block, Member, Order, jobs},
    step::{StepOutput, Trainer},
};
use kto_cli::{Context, Error, Result, escape, input};
use kto_formats::tokens::TokenSet;
use kto_model::{
    architecture::Architecture,
    lora::Lora,
    partners::PromptGroups,
    reference::{self, Pair},
    rows::{Batch, Packing},
    sweep::{BranchStats, Sweep},
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// The held-out rows.
pub struct HeldOut {
    /// The rows. They are cut at their own file's length.
    pub tokens: TokenSet,
    /// The rows that share a KL estimate: all of them, or with `--preset trl` its micro-batches in file order.
    pub blocks: Vec<Block>,
    kl: bool,
}

impl HeldOut {
    /// Reads `--eval-data`, if it is given. Errors (65): no rows, or with a KL term no second prompt.
    pub fn read(args: &Args, micro: usize) -> Result<Option<Self>> {
        let Some(path) = &args.eval_data else { return Ok(None) };
        if path == Path::new("-") {
            return Err(Error::usage("--eval-data is a file; standard input is --data"));
        }
        let input = input::open(path)?;
        let shown = escape(&path.display().to_string());
        let tokens = TokenSet::read(&input.name, input.reader)?;
        if tokens.is_empty() {
            return Err(Error::data(format!("{shown}: no rows")));
        }
        let kl = args.loss == LossKind::Kto;
        let blocks = match args.preset {
            Some(Preset::Trl) => {
                let order = Order::trl(tokens.len(), micro, micro);
                let rows = order.epoch(0);
                (0..order.steps_per_epoch()).flat_map(|step| order.step(0, &rows, step)).collect()
            }
            None => vec![drawn(&tokens, args.seed, kl).at(&shown)?],
        };
        Ok(Some(Self { tokens, blocks, kl }))
    }

    /// Fails (65) when a token id has no row in the embedding.
    pub fn check_ids(&self, architecture: &Architecture) -> Result<()> {
        data::check_ids(architecture, &self.tokens).at("--eval-data")
    }

    /// Returns the length at which rows are cut.
    pub fn max_length(&self) -> usize {
        self.tokens.meta.max_length as usize
    }

    /// Returns every pair that an evaluation scores.
    pub fn pairs(&self) -> BTreeSet<Pair> {
        let pairs = jobs(&self.blocks, self.kl).into_iter();
        pairs.map(|job| (job.prompt as u32, job.completion as u32)).collect()
    }
}

/// Returns all rows with their KL partners: completions of other prompts, for (seed, row).
fn drawn(tokens: &TokenSet, seed: u64, kl: bool) -> Result<Block> {
    let partners = match PromptGroups::new(tokens).held_out(seed) {
        Some(partners) => partners,
        None if !kl => (0..tokens.len()).collect(),
        None => {
            let text =
                "all held-out rows have the same prompt: the KL term needs completions of another prompt";
            return Err(Error::data(text).with_hint("--loss apo-zero has no KL term"));
        }
    };
    Ok(partners.into_iter().enumerate().map(|(row, partner)| Member { row, partner }).collect())
}

/// How the sweeps of an evaluation are cut: as those of its reference pass.
#[derive(Clone, Copy, Debug)]
pub struct EvalForm {
    /// Rows of a pack, about.
    pub pack_rows: usize,
    /// Rows of a sweep, about.
    pub sweep_rows: usize,
}

/// Scores all held-out rows with `lora`. `trainer` has their tokens and references. `check` is asked after every sweep whether to go on.
pub fn evaluate(
    held_out: &HeldOut,
    trainer: &Trainer,
    lora: &Lora,
    form: EvalForm,
    mut check: impl FnMut() -> Result<()>,
) -> Result<StepOutput> {
    let sweep = Sweep {
        base: trainer.base,
        lora: Some(lora),
        dropout: None,
        workspace: trainer.workspace,
        watch: None,
    };
    let limits = trainer.base.architecture.limits(trainer.max_length);
    let pairs: Vec<Pair> = held_out.pairs().into_iter().collect();
    let mut scores: BTreeMap<Pair, BranchStats> = BTreeMap::new();
    for cut in reference::sweeps(trainer.tokens, &pairs, form.sweep_rows) {
        let chunk = &pairs[cut];
        let packing = Packing::Shared(form.pack_rows);
        let batch = Batch::new(trainer.tokens, limits, &reference::jobs(chunk), packing);
        let stats = batch.by_job(&sweep.forward(&batch.packs, false)?.branches);
        scores.extend(chunk.iter().copied().zip(stats));
        check()?;
    }
    let jobs = jobs(&held_out.blocks, held_out.kl);
    let of = |job: &kto_model::rows::Job| {
        let found = scores.get(&(job.prompt as u32, job.completion as u32)).copied();
        found.ok_or_else(|| Error::internal("a held-out pair was not scored"))
    };
    let stats: Vec<BranchStats> = jobs.iter().map(of).collect::<Result<_>>()?;
    trainer.score(&held_out.blocks, &stats)
}

/// Returns what the user reads of a line of eval.jsonl.
pub fn describe(line: &Value) -> String {
    let mut text = format!("evaluation after step {}", line["step"]);
    for (key, name, digits) in [
        ("eval_loss", "loss", 4),
        ("eval_rewards/margins", "margin", 3),
        ("eval_rewards/accuracies", "accuracy", 3),
        ("eval_kl", "kl", 3),
    ] {
        match line.get(key) {
            Some(Value::Null) => text += &format!(", {name} not finite"),
            Some(value) => text += &format!(", {name} {:.digits$}", value.as_f64().unwrap_or_default()),
            None => {}
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use kto_formats::tokens::{TokenMeta, TokenRow};

    fn tokens(prompts: &[u32]) -> TokenSet {
        let mut set = TokenSet::new(TokenMeta { vocab_size: 100, max_length: 16, ..Default::default() });
        for p in prompts {
            set.push(TokenRow { prompt_ids: &[*p], completion_ids: &[1], label: true, prompt_hash: 0 });
        }
        set
    }

    #[test]
    fn partners_depend_on_seed_and_row_alone() {
        let prompts: Vec<u32> = (0..40).map(|i| i / 2).collect();
        let block = drawn(&tokens(&prompts), 7, true).unwrap();
        assert_eq!(block, drawn(&tokens(&prompts), 7, true).unwrap());
        assert_ne!(block, drawn(&tokens(&prompts), 8, true).unwrap());
        assert!(block.iter().all(|m| prompts[m.row] != prompts[m.partner]));
        let partners: BTreeSet<usize> = block.iter().map(|m| m.partner).collect();
        assert!(partners.len() > 15, "{partners:?}");
        assert!(drawn(&tokens(&[3, 3]), 7, true).is_err() && drawn(&tokens(&[3, 3]), 7, false).is_ok());
    }
}
