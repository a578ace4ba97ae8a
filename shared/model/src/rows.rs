//! From token rows to prompt groups: which completion follows which prompt, cut to the maximum length.

use crate::pack::{BranchSpec, Group, Pack};
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
    /// The caller's number for it.
    pub tag: usize,
}

/// Groups jobs by equal prompt ids, in the order of their first appearance.
/// A prompt with a completion is cut from the right at `max_length` tokens, as TRL cuts it.
pub fn groups<'a>(tokens: &'a TokenSet, max_length: usize, jobs: &[Job]) -> Vec<Group<'a>> {
    let mut places: HashMap<&[u32], usize> = HashMap::new();
    let mut groups: Vec<Group> = Vec::new();
    for job in jobs {
        let prompt = tokens.row(job.prompt).prompt_ids;
        let place = *places.entry(prompt).or_insert_with(|| {
            groups.push(Group { prompt, branches: Vec::new() });
            groups.len() - 1
        });
        let ids = tokens.row(job.completion).completion_ids;
        let ids = &ids[..ids.len().min(max_length.saturating_sub(prompt.len()))];
        groups[place].branches.push(BranchSpec { ids, gradient: job.gradient, tag: job.tag });
    }
    groups
}

/// How jobs become packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Prompts shared, packs of about this many rows.
    Shared(usize),
    /// One branch a pack.
    Single,
}

/// Groups `jobs` and lays them out.
pub fn packs(tokens: &TokenSet, max_length: usize, jobs: &[Job], packing: Packing) -> Vec<Pack> {
    let groups = groups(tokens, max_length, jobs);
    match packing {
        Packing::Shared(rows) => Pack::split(&groups, rows),
        Packing::Single => Pack::split_single(&groups),
    }
}
