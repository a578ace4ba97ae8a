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
    /// The row of the rotary tables that its first token turns by.
    pub rotary: u32,
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
    /// Which head row predicts it: the trained part's count first, then those of the rest.
    pub head_row: u32,
    /// The token.
    pub target: u32,
    /// Index into [`Pack::branches`].
    pub branch: u32,
}

/// A contiguous part of a pack's rows.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Its rows in the pack.
    pub rows: Range<usize>,
    /// Attention of all its rows; queries count within the part, keys within the pack.
    pub layout: AttentionLayout,
    /// Rows (within the part) whose output the head reads, ascending.
    pub head_rows: Vec<u32>,
    /// Attention of the head rows only, as queries in the last block.
    pub head_layout: AttentionLayout,
}

/// Rows computed together, T of them: those that need a gradient, then the rest.
#[derive(Clone, Debug, Default)]
pub struct Pack {
    /// Token ids (T).
    pub ids: Vec<u32>,
    /// Rows of the rotary tables (T): positions, counted from where the group's table begins; every branch continues from its
    /// prompt's end.
    pub positions: Vec<u32>,
    /// Names of the rows for dropout masks (T).
    pub keys: Vec<u64>,
    /// The rows that need a gradient. They see no key of the rest.
    pub trained: Part,
    /// The others.
    pub rest: Part,
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
    rotary: u32,
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
        let (mut pack, mut trained_rows) = (Self::default(), 0);
        let mut placed: Vec<Option<Placed>> = groups.iter().map(|_| None).collect();
        for pass in [true, false] {
            for (group, slot) in groups.iter().zip(&mut placed) {
                let trained = group.branches.iter().any(|b| b.gradient);
                if trained == pass {
                    *slot = Some(pack.push_prompt(group));
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
                trained_rows = pack.ids.len();
            }
        }
        let placed: Vec<Placed> = placed.into_iter().flatten().collect();
        pack.lay_out(&placed, trained_rows);
        pack.list_entries(groups, &placed);
        pack
    }

    /// Cuts `groups` into packs of about `limit` rows; one group is never cut.
    pub fn split(groups: &[Group], limit: usize) -> Vec<Self> {
        cuts(groups, limit).into_iter().map(|cut| Self::new(&groups[cut])).collect()
    }

    /// Makes one pack a branch: nothing is shared. Needed with dropout, and the check of the shared form.
    pub fn split_single(groups: &[Group]) -> Vec<Self> {
        let single = |g: &Group, b: &BranchSpec| Self::new(&[Group { branches: vec![*b], ..*g }]);
        groups.iter().flat_map(|g| g.branches.iter().map(|b| single(g, b)).collect::<Vec<_>>()).collect()
    }

    fn push_prompt(&mut self, group: &Group) -> Placed {
        let (prompt, rotary) = (self.ids.len(), group.rotary);
        self.push_rows(group.prompt, (0, rotary), group.branches.first().map_or(0, |b| b.tag));
        Placed { prompt, prompt_len: group.prompt.len(), rotary, branches: Vec::new() }
    }

    fn push_branch(&mut self, place: &mut Placed, branch: &BranchSpec, spec: usize) {
        let (first, len) = (self.ids.len(), branch.ids.len());
        place.branches.push(PlacedBranch { first, len, branch: self.branches.len(), spec });
        self.push_rows(branch.ids, (place.prompt_len, place.rotary), branch.tag);
        self.branches.push(Branch { tag: branch.tag, gradient: branch.gradient });
    }

    fn push_rows(&mut self, ids: &[u32], (first_position, rotary): (usize, u32), tag: usize) {
        for (i, id) in ids.iter().enumerate() {
            let position = first_position + i;
            self.ids.push(*id);
            self.positions.push(rotary + position as u32);
            self.keys.push(random::key(&[tag as u64, position as u64]));
        }
    }

    /// Returns the number of rows whose output the head reads.
    pub fn head_rows(&self) -> usize {
        self.trained.head_rows.len() + self.rest.head_rows.len()
    }

    /// Fills both parts.
    fn lay_out(&mut self, placed: &[Placed], trained_rows: usize) {
        let mut head_rows = Vec::new();
        for p in placed {
            head_rows.push(p.prompt + p.prompt_len - 1);
            head_rows.extend(p.branches.iter().flat_map(|b| b.first..b.first + b.len.saturating_sub(1)));
        }
        head_rows.sort_unstable();
        self.trained = Part::new(0..trained_rows, placed, &head_rows);
        self.rest = Part::new(trained_rows..self.ids.len(), placed, &head_rows);
    }

    /// Returns the place of a row among the head rows.
    fn head_row(&self, row: usize) -> u32 {
        let (part, before) = match row < self.trained.rows.end {
            true => (&self.trained, 0),
            false => (&self.rest, self.trained.head_rows.len()),
        };
        (before + part.head_rows.partition_point(|r| (*r as usize) < row - part.rows.start)) as u32
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

impl Part {
    fn new(rows: Range<usize>, placed: &[Placed], head_rows: &[usize]) -> Self {
        let heads = head_rows.iter().filter(|r| rows.contains(r)).map(|r| (r - rows.start) as u32).collect();
        let mut part = Self { rows, head_rows: heads, ..Self::default() };
        for p in placed {
            let branches = p.branches.iter().map(|b| Segment {
                query: b.first,
                queries: b.len,
                prefix: p.prompt,
                prefix_len: p.prompt_len,
                own: b.first,
                offset: 0,
            });
            let prompt = Segment {
                query: p.prompt,
                queries: p.prompt_len,
                prefix: 0,
                prefix_len: 0,
                own: p.prompt,
                offset: 0,
            };
            let inside = |s: &Segment| s.queries > 0 && part.rows.contains(&s.query);
            let here: Vec<Segment> = std::iter::once(prompt)
                .chain(branches)
                .filter(inside)
                .map(|s| Segment { query: s.query - part.rows.start, ..s })
                .collect();
            let head = |s: &Segment| part.head_segment(s, s.own == p.prompt);
            let heads = here.iter().filter_map(head).collect();
            add_group(&mut part.layout, here);
            add_group(&mut part.head_layout, heads);
        }
        part
    }

    /// Returns the piece of a segment whose outputs the head reads: a prompt's last row, all but the last of a branch.
    fn head_segment(&self, s: &Segment, prompt: bool) -> Option<Segment> {
        let (skip, queries) = if prompt { (s.queries - 1, 1) } else { (0, s.queries - 1) };
        let query = self.head_rows.partition_point(|r| (*r as usize) < s.query + skip);
        (queries > 0).then_some(Segment { query, queries, offset: skip, ..*s })
    }
}

fn add_group(layout: &mut AttentionLayout, segments: Vec<Segment>) {
    if segments.is_empty() {
        return;
    }
    let start = layout.segments.len();
    layout.segments.extend(segments);
    layout.groups.push(start..layout.segments.len());
}
