//! From token rows to prompt groups: which completion follows which prompt, cut to the maximum length.

use crate::{
    pack::{BranchSpec, Group, Pack},
    sweep::BranchStats,
};
use kto_formats::tokens::TokenSet;
use std::collections::HashMap;

/// One completion to score after one prompt. For a KL pair the two come from different rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Row whose prompt is used.
    pub prompt: usize,
    /// Row whose completion is used.
    pub completion: usize,
    /// Whether it is trained.
    pub gradient: bool,
}

/// How rows are cut and turned; see [`crate::architecture::Architecture::limits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens of a prompt with a completion.
    pub max_length: usize,
    /// A sequence of more tokens turns by the second rotary table, which lies behind so many rows of the first.
    pub original: Option<usize>,
}

impl Limits {
    /// Returns the row of the rotary tables that the first token of a sequence of `length` tokens turns by.
    pub fn rotary(&self, length: usize) -> u32 {
        self.original.filter(|original| length > *original).unwrap_or(0) as u32
    }
}

/// Jobs laid out as packs.
pub struct Batch {
    /// The packs; a branch's tag is the number of its job.
    pub packs: Vec<Pack>,
    /// By job: the job that is computed for it. A KL pair whose text another job has already is not computed twice.
    same: Vec<usize>,
}

impl Batch {
    /// Groups `jobs` by equal prompts and lays them out. A prompt with a completion is cut from the right at
    /// [`Limits::max_length`] tokens, as TRL cuts it.
    pub fn new(tokens: &TokenSet, limits: Limits, jobs: &[Job], packing: Packing) -> Self {
        let (groups, same) = groups(tokens, limits, jobs, packing);
        let packs = match packing {
            Packing::Shared(rows) => Pack::split(&groups, rows),
            Packing::Single => Pack::split_single(&groups),
        };
        Self { packs, same }
    }

    /// Sorts what a sweep says about branches by job.
    pub fn by_job(&self, branches: &[Vec<BranchStats>]) -> Vec<BranchStats> {
        let mut stats = vec![BranchStats::default(); self.same.len()];
        for b in branches.iter().flatten() {
            stats[b.tag] = *b;
        }
        self.same.iter().map(|job| stats[*job]).collect()
    }
}

/// Groups jobs by equal prompt ids, in the order of their first appearance, and says which job stands for which.
/// An untrained job joins an equal one. With one branch a pack, which is for dropout, it joins no trained one: masked, that is
/// another function. Where long sequences turn otherwise, a prompt is computed for each way in which it is turned.
pub fn groups<'a>(
    tokens: &'a TokenSet,
    limits: Limits,
    jobs: &[Job],
    packing: Packing,
) -> (Vec<Group<'a>>, Vec<usize>) {
    let mut places: HashMap<(&[u32], u32), usize> = HashMap::new();
    let mut groups: Vec<Group> = Vec::new();
    let mut same = Vec::with_capacity(jobs.len());
    for (tag, job) in jobs.iter().enumerate() {
        let prompt = tokens.row(job.prompt).prompt_ids;
        let ids = tokens.row(job.completion).completion_ids;
        let ids = &ids[..ids.len().min(limits.max_length.saturating_sub(prompt.len()))];
        let rotary = limits.rotary(prompt.len() + ids.len());
        let place = *places.entry((prompt, rotary)).or_insert_with(|| {
            groups.push(Group { prompt, rotary, branches: Vec::new() });
            groups.len() - 1
        });
        let branches = &mut groups[place].branches;
        let equal =
            |b: &&BranchSpec| b.ids == ids && !job.gradient && (packing != Packing::Single || !b.gradient);
        match branches.iter().find(equal) {
            Some(other) => same.push(other.tag),
            None => {
                branches.push(BranchSpec { ids, gradient: job.gradient, tag });
                same.push(tag);
            }
        }
    }
    (groups, same)
}

/// How jobs become packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Prompts shared, packs of about this many rows.
    Shared(usize),
    /// One branch a pack.
    Single,
}
