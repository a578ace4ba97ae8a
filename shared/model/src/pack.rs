//! Packs: prompts with their branches laid out as rows without padding, so that a prompt is computed once.
//!
//! Row order: prompts with their trained completions first, group by group; then everything that needs no gradient
//! (KL completions, and whole groups without a trained branch). The first part is thus a contiguous range.

use kto_kernels::{AttentionLayout, Segment, random};
use std::ops::Range;

/// A completion that follows a prompt.
#[derive(Clone, Copy, Debug)]
pub struct BranchSpec<'a> {
    /// Token ids, already cut to the maximum length.
    pub ids: &'a [u32],
    /// Whether its log-probability is trained. KL completions are not.
    pub gradient: bool,
    /// The caller's number for it.
    pub tag: usize,
}

/// A prompt and its completions.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// Token ids, at least one.
    pub prompt: &'a [u32],
    /// Its completions.
    pub branches: Vec<BranchSpec<'a>>,
}

impl Group<'_> {
    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.prompt.len() + self.branches.iter().map(|b| b.ids.len()).sum::<usize>()
    }
}

/// A completion inside a pack.
#[derive(Clone, Copy, Debug)]
pub struct Branch {
    /// The caller's number for it.
    pub tag: usize,
    /// Whether it is trained.
    pub gradient: bool,
}

/// One token whose log-probability is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Which of [`Pack::head_rows`] predicts it.
    pub head_row: u32,
    /// The token.
    pub target: u32,
    /// Index into [`Pack::branches`].
    pub branch: u32,
}

/// Rows computed together. T is the number of all rows, Tg of the rows that need a gradient.
#[derive(Clone, Debug, Default)]
pub struct Pack {
    /// Token ids (T).
    pub ids: Vec<u32>,
    /// Positions (T); every branch continues from its prompt's end.
    pub positions: Vec<u32>,
    /// Names of the rows for dropout masks (T).
    pub keys: Vec<u64>,
    /// Tg
    pub gradient_rows: usize,
    /// Attention of all rows.
    pub layout: AttentionLayout,
    /// Attention among the gradient rows.
    pub gradient_layout: AttentionLayout,
    /// Rows whose output the head reads, ascending.
    pub head_rows: Vec<u32>,
    /// How many of them are gradient rows.
    pub gradient_head_rows: usize,
    /// Attention of the head rows only (as queries) in the last block.
    pub head_layout: AttentionLayout,
    /// The same among the gradient rows.
    pub gradient_head_layout: AttentionLayout,
    /// Wanted tokens: those of trained branches first, each branch's in order.
    pub entries: Vec<Entry>,
    /// How many of them belong to trained branches.
    pub gradient_entries: usize,
    /// The completions.
    pub branches: Vec<Branch>,
}

/// Where a group's parts lie in the pack.
struct Placed {
    prompt: usize,
    prompt_len: usize,
    gradient: bool,
    branches: Vec<PlacedBranch>,
}

#[derive(Clone, Copy)]
struct PlacedBranch {
    /// First row and number of rows.
    first: usize,
    len: usize,
    /// Index into the pack's branches and into the group's.
    branch: usize,
    spec: usize,
}

impl Pack {
    /// Lays out `groups`.
    pub fn new(groups: &[Group]) -> Self {
        let mut pack = Self::default();
        let mut placed: Vec<Option<Placed>> = groups.iter().map(|_| None).collect();
        for pass in [true, false] {
            for (group, slot) in groups.iter().zip(&mut placed) {
                let trained = group.branches.iter().any(|b| b.gradient);
                if trained == pass {
                    *slot = Some(pack.push_prompt(
                        group.prompt,
                        trained,
                        group.branches.first().map_or(0, |b| b.tag),
                    ));
                }
                if let Some(place) = slot {
                    for (spec, branch) in
                        group.branches.iter().enumerate().filter(|(_, b)| b.gradient == pass)
                    {
                        pack.push_branch(place, branch, spec);
                    }
                }
            }
            if pass {
                pack.gradient_rows = pack.ids.len();
            }
        }
        let placed: Vec<Placed> = placed.into_iter().flatten().collect();
        pack.lay_out(&placed);
        pack.list_entries(groups, &placed);
        pack
    }

    /// Cuts `groups` into packs of about `limit` rows; one group is never cut.
    pub fn split(groups: &[Group], limit: usize) -> Vec<Self> {
        cuts(groups, limit).into_iter().map(|cut| Self::new(&groups[cut])).collect()
    }

    /// Makes one pack a branch: nothing is shared. Needed with dropout, and the check of the shared form.
    pub fn split_single(groups: &[Group]) -> Vec<Self> {
        let single = |g: &Group, b: &BranchSpec| Self::new(&[Group { prompt: g.prompt, branches: vec![*b] }]);
        groups.iter().flat_map(|g| g.branches.iter().map(|b| single(g, b)).collect::<Vec<_>>()).collect()
    }

    fn push_prompt(&mut self, ids: &[u32], gradient: bool, tag: usize) -> Placed {
        let prompt = self.ids.len();
        self.push_rows(ids, 0, tag);
        Placed { prompt, prompt_len: ids.len(), gradient, branches: Vec::new() }
    }

    fn push_branch(&mut self, place: &mut Placed, branch: &BranchSpec, spec: usize) {
        let (first, len) = (self.ids.len(), branch.ids.len());
        place.branches.push(PlacedBranch { first, len, branch: self.branches.len(), spec });
        self.push_rows(branch.ids, place.prompt_len, branch.tag);
        self.branches.push(Branch { tag: branch.tag, gradient: branch.gradient });
    }

    fn push_rows(&mut self, ids: &[u32], first_position: usize, tag: usize) {
        for (i, id) in ids.iter().enumerate() {
            let position = first_position + i;
            self.ids.push(*id);
            self.positions.push(position as u32);
            self.keys.push(random::key(&[tag as u64, position as u64]));
        }
    }

    /// Fills the four attention layouts and the head rows.
    fn lay_out(&mut self, placed: &[Placed]) {
        let mut head_rows = Vec::new();
        for p in placed {
            head_rows.push(p.prompt + p.prompt_len - 1);
            head_rows.extend(p.branches.iter().flat_map(|b| b.first..b.first + b.len.saturating_sub(1)));
        }
        head_rows.sort_unstable();
        self.head_rows = head_rows.iter().map(|r| *r as u32).collect();
        self.gradient_head_rows = head_rows.partition_point(|r| *r < self.gradient_rows);
        for p in placed {
            let prompt = Segment {
                query: p.prompt,
                queries: p.prompt_len,
                prefix: 0,
                prefix_len: 0,
                own: p.prompt,
                offset: 0,
            };
            let branch = |b: &PlacedBranch| Segment {
                query: b.first,
                queries: b.len,
                prefix: p.prompt,
                prefix_len: p.prompt_len,
                own: b.first,
                offset: 0,
            };
            let all: Vec<Segment> = std::iter::once(prompt).chain(p.branches.iter().map(branch)).collect();
            let inside = |s: &Segment| p.gradient && s.query < self.gradient_rows;
            let head = |s: &Segment| self.head_segment(s, s.query == p.prompt);
            let heads: Vec<Segment> = all.iter().filter_map(head).collect();
            let trained = |from: &[Segment], limit: usize| {
                from.iter().filter(|s| p.gradient && s.query < limit).copied().collect()
            };
            let gradient: Vec<Segment> = all.iter().filter(|s| inside(s)).copied().collect();
            let gradient_heads: Vec<Segment> = trained(&heads, self.gradient_head_rows);
            add_group(&mut self.layout, all);
            add_group(&mut self.gradient_layout, gradient);
            add_group(&mut self.head_layout, heads);
            add_group(&mut self.gradient_head_layout, gradient_heads);
        }
    }

    /// Returns the part of a segment whose outputs the head reads: a prompt's last row, all but the last of a branch.
    fn head_segment(&self, s: &Segment, prompt: bool) -> Option<Segment> {
        let (skip, queries) = if prompt { (s.queries - 1, 1) } else { (0, s.queries.saturating_sub(1)) };
        if queries == 0 {
            return None;
        }
        Some(Segment { query: self.head_row(s.query + skip) as usize, queries, offset: skip, ..*s })
    }

    fn head_row(&self, row: usize) -> u32 {
        self.head_rows.partition_point(|r| (*r as usize) < row) as u32
    }

    fn list_entries(&mut self, groups: &[Group], placed: &[Placed]) {
        for pass in [true, false] {
            for (group, place) in groups.iter().zip(placed) {
                let last = self.head_row(place.prompt + place.prompt_len - 1);
                for b in place.branches.iter().filter(|b| group.branches[b.spec].gradient == pass) {
                    let start = self.head_row(b.first);
                    for (i, target) in group.branches[b.spec].ids.iter().enumerate() {
                        let head_row = if i == 0 { last } else { start + i as u32 - 1 };
                        self.entries.push(Entry { head_row, target: *target, branch: b.branch as u32 });
                    }
                }
            }
            if pass {
                self.gradient_entries = self.entries.len();
            }
        }
    }
}

/// Returns which groups go into which pack of about `limit` rows; one group is never cut.
pub(crate) fn cuts(groups: &[Group], limit: usize) -> Vec<Range<usize>> {
    let mut cuts = Vec::new();
    let (mut start, mut rows) = (0, 0);
    for (i, group) in groups.iter().enumerate() {
        if i > start && rows + group.rows() > limit {
            cuts.push(start..i);
            (start, rows) = (i, 0);
        }
        rows += group.rows();
    }
    if start < groups.len() {
        cuts.push(start..groups.len());
    }
    cuts
}

fn add_group(layout: &mut AttentionLayout, segments: Vec<Segment>) {
    let start = layout.segments.len();
    layout.segments.extend(segments.into_iter().filter(|s| s.queries > 0));
    layout.groups.push(start..layout.segments.len());
}
