//! How many rows the packs of a batch have, counted without laying them out.

use crate::{
    pack::{Group, Pack, cuts},
    rows::Packing,
};
use std::ops::Range;

/// Rows of a pack by what is done with them; the counts of [`crate::pack::Pack`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackShape {
    /// T, all rows.
    pub rows: usize,
    /// Tg, rows that need a gradient.
    pub gradient_rows: usize,
    /// The others.
    pub rest_rows: usize,
    /// The larger of the two parts, which are computed one after the other.
    pub part_rows: usize,
    /// Rows that the head reads.
    pub head_rows: usize,
    /// Those that need a gradient.
    pub gradient_head_rows: usize,
    /// Scored tokens.
    pub entries: usize,
    /// Those of trained completions.
    pub gradient_entries: usize,
    /// The others.
    pub rest_entries: usize,
}

/// A batch: all packs of a step, or of a sweep of the reference pass. Or the largest of every count over many batches: a buffer
/// is never given back, so each is as large as the batch that needs most of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchShape {
    /// Sums over the packs of a batch.
    pub all: PackShape,
    /// The maximum of every count over the packs.
    pub largest: PackShape,
}

impl PackShape {
    fn of_pack(pack: &Pack) -> Self {
        let (trained, rest) = (pack.trained.rows.len(), pack.rest.rows.len());
        Self {
            rows: pack.ids.len(),
            gradient_rows: trained,
            rest_rows: rest,
            part_rows: trained.max(rest),
            head_rows: pack.head_rows(),
            gradient_head_rows: pack.trained.head_rows.len(),
            entries: pack.entries.len(),
            gradient_entries: pack.gradient_entries,
            rest_entries: pack.entries.len() - pack.gradient_entries,
        }
    }

    fn of(groups: &[Group]) -> Self {
        let mut this = Self::default();
        for group in groups {
            let trained = group.branches.iter().any(|b| b.gradient);
            this.add(group.prompt.len(), 1, 0, trained);
            for b in &group.branches {
                this.add(b.ids.len(), b.ids.len().saturating_sub(1), b.ids.len(), b.gradient);
            }
        }
        this.rest_rows = this.rows - this.gradient_rows;
        this.rest_entries = this.entries - this.gradient_entries;
        this.part_rows = this.gradient_rows.max(this.rest_rows);
        this
    }

    fn add(&mut self, rows: usize, head_rows: usize, entries: usize, gradient: bool) {
        self.rows += rows;
        self.head_rows += head_rows;
        self.entries += entries;
        if gradient {
            self.gradient_rows += rows;
            self.gradient_head_rows += head_rows;
            self.gradient_entries += entries;
        }
    }

    /// Combines every count of two shapes.
    fn with(self, other: Self, f: impl Fn(usize, usize) -> usize) -> Self {
        Self {
            rows: f(self.rows, other.rows),
            gradient_rows: f(self.gradient_rows, other.gradient_rows),
            rest_rows: f(self.rest_rows, other.rest_rows),
            part_rows: f(self.part_rows, other.part_rows),
            head_rows: f(self.head_rows, other.head_rows),
            gradient_head_rows: f(self.gradient_head_rows, other.gradient_head_rows),
            entries: f(self.entries, other.entries),
            gradient_entries: f(self.gradient_entries, other.gradient_entries),
            rest_entries: f(self.rest_entries, other.rest_entries),
        }
    }
}

impl BatchShape {
    /// Returns the shape of the packs that [`crate::rows::Batch`] makes of `groups`.
    pub fn of(groups: &[Group], packing: Packing) -> Self {
        let mut this = Self::default();
        match packing {
            Packing::Shared(limit) => {
                cuts(groups, limit)
                    .into_iter()
                    .for_each(|cut: Range<usize>| this.add(PackShape::of(&groups[cut])));
            }
            Packing::Single => {
                for group in groups {
                    for branch in &group.branches {
                        let single = Group { branches: vec![*branch], ..*group };
                        this.add(PackShape::of(&[single]));
                    }
                }
            }
        }
        this
    }

    /// Returns the shape of packs that are laid out.
    pub fn of_packs(packs: &[Pack]) -> Self {
        let mut this = Self::default();
        packs.iter().for_each(|pack| this.add(PackShape::of_pack(pack)));
        this
    }

    /// Returns the larger of every count.
    pub fn max(self, other: Self) -> Self {
        Self {
            all: self.all.with(other.all, usize::max),
            largest: self.largest.with(other.largest, usize::max),
        }
    }

    fn add(&mut self, pack: PackShape) {
        self.all = self.all.with(pack, |a, b| a + b);
        self.largest = self.largest.with(pack, usize::max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::BranchSpec;

    #[test]
    fn counts_are_those_of_the_packs() {
        let ids: Vec<u32> = (0..100).collect();
        let branch = |len: usize, gradient: bool, tag: usize| BranchSpec { ids: &ids[..len], gradient, tag };
        let mut groups = vec![
            Group { prompt: &ids[..9], rotary: 0, branches: vec![branch(4, true, 0), branch(1, false, 1)] },
            Group { prompt: &ids[..7], rotary: 0, branches: vec![branch(0, true, 2), branch(6, false, 3)] },
            Group { prompt: &ids[..5], rotary: 0, branches: vec![branch(3, false, 4)] },
            Group { prompt: &ids[..30], rotary: 0, branches: vec![branch(20, true, 5), branch(10, true, 6)] },
        ];
        groups.push(groups[0].clone());
        for packing in [1, 20, 60, 1000].map(Packing::Shared).into_iter().chain([Packing::Single]) {
            let packs = match packing {
                Packing::Shared(limit) => Pack::split(&groups, limit),
                Packing::Single => Pack::split_single(&groups),
            };
            let shape = BatchShape::of(&groups, packing);
            assert_eq!(shape, BatchShape::of_packs(&packs), "{packing:?}");
            assert_eq!(shape.all.entries, packs.iter().map(|p| p.entries.len()).sum::<usize>());
            assert_eq!(shape.largest.rows, packs.iter().map(|p| p.ids.len()).max().unwrap());
        }
    }
}
