//! How a segment is cut: blocks of queries, each against tiles of keys.
//!
//! Tiles begin at multiples of [`KEYS`] of their run, so a row's sums are cut at the same places in any block and any batch.

use super::layout::{HeadShape, Segment};
use std::ops::Range;

/// Rows of stacked query heads in one block, about: enough to pay for packing the keys, few enough to waste little above
/// the causal diagonal.
const STACKED: usize = 192;
/// Keys of a tile: its scores and their gradients stay in the second cache.
pub(super) const KEYS: usize = 256;

/// Returns the queries of a block, at most.
pub(super) fn block_queries(shape: HeadShape) -> usize {
    (STACKED * shape.kv_heads / shape.heads).clamp(32, STACKED)
}

/// Cuts a segment into blocks of queries.
pub(super) fn blocks(s: &Segment, shape: HeadShape) -> impl Iterator<Item = Segment> + use<> {
    let (s, most) = (*s, block_queries(shape));
    (0..s.queries).step_by(most).map(move |at| Segment {
        query: s.query + at,
        queries: most.min(s.queries - at),
        offset: s.offset + at,
        ..s
    })
}

/// A run of keys that a block of queries is multiplied with at once.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// First key row.
    pub key: usize,
    /// Number of keys.
    pub keys: usize,
    /// Place of the first one in the queries' own segment; `None` in the prefix, which all see.
    own: Option<usize>,
    /// Place of the first one in the whole sequence, the prefix first.
    place: usize,
}

impl Tile {
    /// Returns which of the keys query `i` of block `b` sees: those up to itself, and of them as many as a window holds.
    pub fn visible(&self, b: &Segment, i: usize, window: Option<usize>) -> Range<usize> {
        let end = self.own.map_or(self.keys, |start| (b.offset + i + 1).saturating_sub(start).min(self.keys));
        first_seen(b, i, window).saturating_sub(self.place).min(end)..end
    }
}

/// Returns the place of the first key that query `i` of a block sees.
fn first_seen(b: &Segment, i: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (b.prefix_len + b.offset + i + 1).saturating_sub(window))
}

/// Cuts the keys of a block into tiles: those of the prefix, then its own up to its last query. Tiles before the window of its first
/// query are left out.
pub(super) fn tiles(b: &Segment, window: Option<usize>) -> impl Iterator<Item = Tile> + use<> {
    let b = *b;
    let cut = |n: usize| (0..n).step_by(KEYS).map(move |at| (at, KEYS.min(n - at)));
    let prefix =
        cut(b.prefix_len).map(move |(at, keys)| Tile { key: b.prefix + at, keys, own: None, place: at });
    let own = cut(b.own_len()).map(move |(at, keys)| Tile {
        key: b.own + at,
        keys,
        own: Some(at),
        place: b.prefix_len + at,
    });
    let first = first_seen(&b, 0, window);
    prefix.chain(own).filter(move |t| t.place + t.keys > first)
}

/// Cuts the blocks of a group into `parts` consecutive ranges of about the same work.
pub(super) fn shares(blocks: &[Segment], parts: usize) -> Vec<Range<usize>> {
    let work = |b: &Segment| b.queries * (b.prefix_len + b.own_len());
    let total: usize = blocks.iter().map(work).sum();
    let (mut done, mut ends) = (0, Vec::with_capacity(parts));
    for (i, b) in blocks.iter().enumerate() {
        done += work(b);
        while ends.len() + 1 < parts && done * parts >= total * (ends.len() + 1) {
            ends.push(i + 1);
        }
    }
    ends.resize(parts, blocks.len());
    (0..parts).map(|p| if p == 0 { 0 } else { ends[p - 1] }..ends[p]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: HeadShape = HeadShape { heads: 9, kv_heads: 3, dim: 64 };

    fn segment(queries: usize, prefix_len: usize, offset: usize) -> Segment {
        Segment { query: 5, queries, prefix: 11, prefix_len, own: 4000, offset }
    }

    #[test]
    fn every_query_sees_its_prefix_and_itself_once() {
        for s in [segment(1, 0, 0), segment(300, 700, 0), segment(65, KEYS, 511), segment(600, 0, 3)] {
            let mut next = s.query;
            for b in blocks(&s, SHAPE) {
                assert_eq!(b.query, next);
                next += b.queries;
                for i in 0..b.queries {
                    let mut keys = Vec::new();
                    let seen = |t: Tile| t.visible(&b, i, None).map(move |key| t.key + key);
                    tiles(&b, None).for_each(|t| keys.extend(seen(t)));
                    let own = s.own..s.own + b.offset + i + 1;
                    assert_eq!(keys, (s.prefix..s.prefix + s.prefix_len).chain(own).collect::<Vec<_>>());
                }
            }
            assert_eq!(next, s.query + s.queries);
        }
    }

    #[test]
    fn a_window_holds_the_last_keys() {
        for s in [segment(300, 700, 0), segment(65, KEYS, 511), segment(600, 0, 3)] {
            for window in [1, 7, 250, 256, 257, 900] {
                for b in blocks(&s, SHAPE) {
                    for i in 0..b.queries {
                        let (mut keys, mut all) = (Vec::new(), Vec::new());
                        for t in tiles(&b, Some(window)) {
                            keys.extend(t.visible(&b, i, Some(window)).map(|key| t.key + key));
                        }
                        tiles(&b, None)
                            .for_each(|t| all.extend(t.visible(&b, i, None).map(|key| t.key + key)));
                        assert_eq!(keys, all[all.len().saturating_sub(window)..]);
                    }
                }
            }
        }
    }

    #[test]
    fn shares_are_alike_and_leave_nothing_out() {
        let blocks: Vec<Segment> = blocks(&segment(8192, 0, 0), SHAPE).collect();
        let work =
            |r: &Range<usize>| blocks[r.clone()].iter().map(|b| b.queries * b.own_len()).sum::<usize>();
        let shares = shares(&blocks, 4);
        assert_eq!((shares[0].start, shares[3].end), (0, blocks.len()));
        assert!(shares.windows(2).all(|w| w[0].end == w[1].start));
        let (least, most) = (shares.iter().map(work).min(), shares.iter().map(work).max());
        assert!(most.unwrap() as f64 / (least.unwrap() as f64) < 1.1);
        assert_eq!(super::shares(&blocks[..1], 4).iter().map(Range::len).sum::<usize>(), 1);
    }
}
