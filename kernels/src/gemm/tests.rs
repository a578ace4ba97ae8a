//! What no tensor can show: every instruction set, targets and operands of any strides, the memory around them, cuts of k.

use super::*;
use crate::random;

/// A number that no result is, to tell whether memory was written.
const GUARD: f64 = -12345.678;

fn numbers<T: Real>(n: usize, salt: u64) -> Vec<T> {
    (0..n as u64).map(|i| T::of((random::key(&[salt, i]) as i64 >> 40) as f64 * 1e-7)).collect()
}

fn operand<T>(data: &[T], columns: usize) -> Operand<T> {
    Operand { at: data.as_ptr(), row: columns as isize, column: 1 }
}

/// Returns (sum, sum of sizes) of one element in f64.
fn element<T: Real>(a: &[T], b: &[T], k: usize, n: usize, i: usize, j: usize) -> (f64, f64) {
    (0..k).fold((0.0, 0.0), |(sum, size), p| {
        let term = a[i * k + p].wide() * b[p * n + j].wide();
        (sum + term, size + term.abs())
    })
}

/// Where a result lies in a larger memory: elements before it, between its rows, between its columns.
#[derive(Clone, Copy, Debug)]
struct Lie {
    before: usize,
    row: usize,
    column: usize,
}

/// Computes into guarded memory, looks at the guards, and returns the result row by row.
fn guarded<T: Real>(
    tiles: &'static Tiles<T>,
    lie: Lie,
    (m, n): (usize, usize),
    start: Start<T>,
    terms: &[Term<T>],
    fill: &[T],
) -> Vec<T> {
    let place = |i: usize, j: usize| lie.before + i * lie.row + j * lie.column;
    // Nothing behind the last element: what is written there is beyond the allocation.
    let size = if m * n > 0 { place(m - 1, n - 1) + 1 } else { lie.before };
    let mut memory = vec![T::of(GUARD); size];
    let mut inside = vec![false; size];
    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
        assert!(!std::mem::replace(&mut inside[place(i, j)], true), "the test's own places overlap");
        memory[place(i, j)] = fill.get(i * n + j).copied().unwrap_or(T::of(f64::NAN));
    }
    let at = memory[lie.before.min(size)..].as_mut_ptr();
    // SAFETY: the memory ends with the last element; operands are as large as their sizes say.
    unsafe {
        product_with(tiles, Target { at, row: lie.row, column: lie.column }, m, n, start, terms, false)
    };
    for (v, inside) in memory.iter().zip(&inside) {
        assert!(
            *inside || *v == T::of(GUARD),
            "{}: memory around the result was written, {lie:?}",
            tiles.name
        );
    }
    (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| memory[place(i, j)]).collect()
}

fn bits<T: Real>(values: &[T]) -> Vec<u64> {
    values.iter().map(|v| v.wide().to_bits()).collect()
}

/// All sizes of tiles of all instruction sets, against f64 sums and against each other.
fn instruction_sets<T: Real>(all: Vec<&'static Tiles<T>>, unit: f64) {
    for k in [1, 2, 33, 320, 321] {
        for m in (1..=13).chain([24, 25]) {
            for n in [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65] {
                let (a, b, start) = (numbers::<T>(m * k, 1), numbers::<T>(k * n, 2), numbers::<T>(m * n, 3));
                let scale = T::of(-0.7);
                let term = Term { a: operand(&a, k), b: Right::Matrix(operand(&b, n)), k, scale };
                let lie = Lie { before: 3, row: n, column: 1 };
                let from = Start::Matrix(operand(&start, n));
                let results = all.iter().map(|tiles| guarded(tiles, lie, (m, n), from, &[term], &[]));
                let results: Vec<Vec<T>> = results.collect();
                for (result, tiles) in results.iter().zip(&all) {
                    for (at, v) in result.iter().enumerate() {
                        let (sum, size) = element(&a, &b, k, n, at / n, at % n);
                        let expected = start[at].wide() + scale.wide() * sum;
                        let bound = (k as f64 + 4.0) * unit * (size + start[at].wide().abs());
                        let close = (v.wide() - expected).abs() <= bound;
                        assert!(
                            close,
                            "{} ({m}, {k}, {n}) element {at}: {}, not {expected}",
                            tiles.name,
                            v.wide()
                        );
                    }
                }
                let fused = all.iter().zip(&results).filter(|(tiles, _)| tiles.name != "portable");
                let fused: Vec<_> = fused.map(|(_, result)| bits(result)).collect();
                assert!(fused.windows(2).all(|two| two[0] == two[1]), "({m}, {k}, {n}): sets differ");
            }
        }
    }
}

#[test]
fn instruction_sets_agree_in_f32() {
    instruction_sets(tile::all_f32(), 2f64.powi(-24));
}

#[test]
fn instruction_sets_agree_in_f64() {
    instruction_sets(tile::all_f64(), 2.0 * 2f64.powi(-53));
}

/// Every kind of target, start and first operand gives the same bits and writes nothing beside the target.
fn targets<T: Real>(all: Vec<&'static Tiles<T>>) {
    for tiles in all {
        for (m, k, n) in [(1, 5, 1), (7, 321, 33), (25, 17, 64), (97, 8, 19), (13, 330, 5)] {
            let (a, b, start) = (numbers::<T>(m * k, 1), numbers::<T>(k * n, 2), numbers::<T>(m * n, 3));
            let plain = Lie { before: 0, row: n, column: 1 };
            let term = Term { a: operand(&a, k), b: Right::Matrix(operand(&b, n)), k, scale: T::of(0.3) };
            let from = Start::Matrix(operand(&start, n));
            let expected = bits(&guarded(tiles, plain, (m, n), from, &[term, term], &[]));
            let lies = [
                plain,
                Lie { before: 5, row: n + 3, column: 1 },
                Lie { before: 2, row: 1, column: m },
                Lie { before: 1, row: 1, column: m + 7 },
                Lie { before: 4, row: 2, column: 2 * m + 1 },
                Lie { before: 0, row: 3 * n + 1, column: 3 },
            ];
            for lie in lies {
                let found = guarded(tiles, lie, (m, n), from, &[term, term], &[]);
                assert!(bits(&found) == expected, "{} onto a matrix, {lie:?}", tiles.name);
                let found = guarded(tiles, lie, (m, n), Start::Target, &[term, term], &start);
                assert!(bits(&found) == expected, "{} onto itself, {lie:?}", tiles.name);
                // Both sides transposed: the same sums in another place.
                let turned =
                    Term { a: operand(&b, n).transposed(), b: Right::Matrix(term.a.transposed()), ..term };
                let back = Lie { before: lie.before, row: lie.column, column: lie.row };
                let mut fill = Vec::new();
                (0..n).for_each(|j| fill.extend((0..m).map(|i| start[i * n + j])));
                let found = guarded(tiles, back, (n, m), Start::Target, &[turned, turned], &fill);
                let found: Vec<T> = (0..m * n).map(|at| found[at % n * m + at / n]).collect();
                assert!(bits(&found) == expected, "{} turned, {lie:?}", tiles.name);
                let zero = guarded(tiles, lie, (m, n), Start::Zero, &[term], &[]);
                let zeros = [T::ZERO; 64];
                let one = Start::Matrix(Operand { at: zeros.as_ptr(), row: 0, column: 1 });
                assert_eq!(bits(&zero), bits(&guarded(tiles, plain, (m, n), one, &[term], &[])));
            }
        }
    }
}

#[test]
fn targets_of_any_strides_in_f32() {
    targets(tile::all_f32());
}

#[test]
fn targets_of_any_strides_in_f64() {
    targets(tile::all_f64());
}

#[test]
fn one_row_starts_all_rows() {
    for tiles in tile::all_f32() {
        for (m, n) in [(1, 1), (13, 33), (100, 64), (5, 7)] {
            let (a, b, row) = (numbers::<f32>(m * 9, 1), numbers::<f32>(9 * n, 2), numbers::<f32>(n, 3));
            let term = Term { a: operand(&a, 9), b: Right::Matrix(operand(&b, n)), k: 9, scale: 1.0 };
            let lie = Lie { before: 2, row: n, column: 1 };
            let repeated = row.repeat(m);
            let one = Start::Matrix(Operand { at: row.as_ptr(), row: 0, column: 1 });
            for terms in [&[term][..], &[]] {
                let expected = guarded(tiles, lie, (m, n), Start::Matrix(operand(&repeated, n)), terms, &[]);
                assert_eq!(guarded(tiles, lie, (m, n), one, terms, &[]), expected);
            }
        }
    }
}

#[test]
fn nothing_is_written_where_nothing_is() {
    let data = numbers::<f32>(100, 1);
    let term = Term { a: operand(&data, 5), b: Right::Matrix(operand(&data, 5)), k: 5, scale: 1.0 };
    for tiles in tile::all_f32() {
        for size in [(0, 0), (0, 7), (7, 0)] {
            for start in [Start::Zero, Start::Target, Start::Matrix(operand(&data, 7))] {
                let lie = Lie { before: 3, row: size.1, column: 1 };
                assert!(guarded(tiles, lie, size, start, &[term], &[]).is_empty());
                assert!(guarded(tiles, lie, size, start, &[], &[]).is_empty());
            }
        }
    }
}

/// Cuts of k depend on k alone, cover it in order, and fit together into groups of any size.
#[test]
fn runs_of_k_are_equal_and_whole() {
    for k in (0..700).chain([960, 961, 1023, 1024, 1025, 4099, 100_000]) {
        let nothing: Operand<f32> = Operand { at: std::ptr::null(), row: 0, column: 0 };
        let term = |k| Term { a: nothing, b: Right::Matrix(nothing), k, scale: 1.0 };
        let terms = [term(k), term(7), term(0), term(k)];
        let cut: Vec<Piece> = pieces(&terms).collect();
        for (t, term) in terms.iter().enumerate() {
            let own: Vec<&Piece> = cut.iter().filter(|p| p.term == t).collect();
            assert_eq!(own.len(), term.k.div_ceil(CHUNK));
            let mut at = 0;
            for piece in own {
                assert_eq!(piece.at, at);
                assert!((1..=CHUNK).contains(&piece.k));
                at += piece.k;
            }
            assert_eq!(at, term.k);
        }
        for most in [CHUNK, CHUNK + 1, 1000, 5000] {
            let (mut rest, mut seen) = (pieces(&terms).peekable(), 0);
            while let Some(group) = group(&mut rest, most) {
                let mut below = 0;
                for piece in &group {
                    assert_eq!((piece.term, piece.at, piece.below), (cut[seen].term, cut[seen].at, below));
                    (below, seen) = (below + piece.k, seen + 1);
                }
                assert!(below <= most);
            }
            assert_eq!(seen, cut.len());
        }
    }
}

#[test]
fn squares_are_transposed() {
    fn check<T: Real>(turn: TransposeSquare<T>) {
        let from = numbers::<T>(8 * 11, 1);
        let mut to = vec![T::of(GUARD); 7 * 9 + 8];
        // SAFETY: eight rows of eight at a distance of 11 in `from` and of 9 in `to`.
        unsafe { turn(from.as_ptr(), 11, to.as_mut_ptr(), 9) };
        for (at, v) in to.iter().enumerate() {
            let expected = if at % 9 < 8 { from[at % 9 * 11 + at / 9] } else { T::of(GUARD) };
            assert_eq!(v.wide(), expected.wide());
        }
    }
    check(transpose_square::<f32>);
    check(transpose_square::<f64>);
    check(transpose_square_f32());
}

/// Scratch inside scratch is other memory, whatever was used before.
#[test]
fn scratch_is_aligned_and_never_shared() {
    for round in 0..3 {
        pack::with_scratch(1000 * round, |outer: &mut [f32]| {
            outer.fill(1.0);
            pack::with_scratch(100, |inner: &mut [f32]| {
                assert!(inner.as_ptr().addr().is_multiple_of(64));
                assert_eq!(inner.len(), 100);
                inner.fill(2.0);
                pack::with_scratch(5000, |innermost: &mut [f32]| innermost.fill(3.0));
                assert!(inner.iter().all(|v| *v == 2.0));
            });
            assert_eq!(outer.len(), 1000 * round);
            assert!(outer.iter().all(|v| *v == 1.0));
        });
    }
}
