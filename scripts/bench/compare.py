#!/usr/bin/env python3
"""Runs our step and the peer's in turn, on the same rows, and writes bench/runs/DATE-CASE.json.

usage: compare.py [--steps N] [--threads 2] [--shape NAME] [--work DIR] [--allocator default|tuned] CASE…

cases: allocator          the peer under two allocator settings, against itself
       paired-default     a prompt shared by two completions; TRL as it is; also a whole epoch with our reference pass
       paired-precomputed the same, TRL with reference log-probabilities computed beforehand
       small-memory       kto-train --memory 900MiB, TRL with checkpointing
       unshared           each prompt once, TRL with reference log-probabilities computed beforehand

Both start from the same adapter and see the same rows in the same order; the losses of every step must be equal within
1e-5, or the run fails. The steps are interleaved A B B A …; who is not at its turn is stopped. The first step of each
is written down and not counted.
"""
import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import machine
import operations
from contenders import Ours, Peer
from shapes import SHAPES

HERE = Path(__file__).resolve().parent
ROOT = machine.ROOT
BATCH, LR, LOSS_TOLERANCE = 4, "1e-4", 1e-5
# Keeps freed memory instead of returning it: fresh pages cost torch a good part of a step.
TUNED = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"}
ALLOCATORS = {"default": {}, "tuned": TUNED}

# sharing, our options, the peer's options; a case with two peers and no options of ours compares the peer with itself.
CASES = {
    "allocator": ("paired", None, []),
    "paired-default": ("paired", [], []),
    "paired-precomputed": ("paired", [], ["--precompute"]),
    "small-memory": ("paired", ["--memory", "900MiB"], ["--checkpointing"]),
    "unshared": ("unshared", [], ["--precompute"]),
}


def prepare(args, sharing):
    """Writes the model and the rows, once."""
    model = args.work / args.shape
    rows = args.work / f"{args.shape}-{sharing}-{args.steps}.jsonl"
    tool = [sys.executable, HERE / "workload.py"]
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        subprocess.run([*tool, "model", model, "--shape", args.shape], check=True)
    vocab = str(SHAPES[args.shape].vocab)
    subprocess.run([*tool, "rows", rows, "--vocab", vocab, "--steps", str(args.steps), "--batch", str(BATCH),
                    "--sharing", sharing], check=True)
    tokens = rows.with_suffix(".kto.arrow")
    subprocess.run([args.bin / "kto-tokenize", "-q", "--model", model, rows, "-o", tokens], check=True)
    return model, rows, tokens


def peer(args, model, rows, options, allocator, number=0):
    command = [sys.executable, HERE / "peer_trl.py", "--model", model, "--rows", rows, "--adapter",
               args.work / f"adapter{number}", "--batch", BATCH, "--steps", args.steps, "--threads", args.threads, "--lr", LR,
               *options]
    return Peer([str(c) for c in command], args.work / f"peer{number}.log", ALLOCATORS[allocator])


def ours(args, model, tokens, options):
    out = args.work / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = [args.bin / "kto-train", "--model", model, "--data", tokens, "--init-adapter", args.work / "adapter0",
               "--preset", "trl", "--batch", BATCH, "--lr", LR, "--max-steps", args.steps, "--threads", args.threads, *options]
    return Ours([str(c) for c in command], out, args.work / "ours.log")


def interleave(a, b, steps):
    """Lets both do their steps in turn; returns their records."""
    results = [], []
    for step in range(steps):
        turns = [(a, results[0]), (b, results[1])]
        for contender, records in turns if step % 2 == 0 else reversed(turns):
            records.append(contender.turn())
        x, y = results[0][-1], results[1][-1]
        print(f"  step {step + 1}: {x['seconds']:8.3f} s  {y['seconds']:8.3f} s  loss {x['loss']:.7f} {y['loss']:.7f}", flush=True)
    for contender in (a, b):
        contender.process.finish()
    return results


def summary(contender, records, start):
    times = [r["seconds"] for r in records[1:]]
    return {
        "name": contender.name, "start_seconds": start, "total_seconds": contender.process.running,
        "median_seconds": statistics.median(times), "min_seconds": min(times), "max_seconds": max(times),
        "peak_rss_bytes": contender.process.peak, "steps": records,
    }


def run(args, case):
    sharing, our_options, peer_options = CASES[case]
    model, rows, tokens = prepare(args, sharing)
    before = machine.rates(args.threads)
    live = []
    try:
        if our_options is None:
            live = [peer(args, model, rows, peer_options, name, i) for i, name in enumerate(ALLOCATORS)]
            for contender, name in zip(live, ALLOCATORS):
                contender.name = f"TRL, {name} allocator"
            starts = [contender.prepare() for contender in live]
        else:
            live = [peer(args, model, rows, peer_options, args.allocator)]
            starts = [live[0].prepare()]  # which writes the adapter that ours starts from
            live.insert(0, ours(args, model, tokens, our_options))
            starts.insert(0, live[0].prepare())
        records = interleave(*live, args.steps)
    finally:
        for contender in live:
            contender.process.kill()
    return result(args, case, rows, live, starts, records, [before, machine.rates(args.threads)])


def result(args, case, rows, live, starts, records, rates):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lengths = operations.lengths_of(lines)
    tokens = [sum(r["prompt"] + r["completion"] for r in lengths[i * BATCH : (i + 1) * BATCH]) for i in range(args.steps)]
    assert all(r.get("tokens", n) == n for n, r in zip(tokens, records[1])), "the peer counts other tokens"
    a, b = records
    difference = max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b))
    pairs = [y["seconds"] / x["seconds"] for x, y in zip(a[1:], b[1:])]
    sides = [summary(c, r, s) for c, r, s in zip(live, records, starts)]
    peers = [c.done for c in live if isinstance(c, Peer)]
    return {
        "case": case, "date": args.date, "revision": machine.revision(), "machine": machine.describe(),
        "versions": peers[-1]["versions"], "settings": {
            "shape": args.shape, "threads": args.threads, "batch": BATCH, "rows": CASES[case][0], "steps": args.steps,
            "ours": CASES[case][1], "peer": CASES[case][2], "peer_allocator": args.allocator if CASES[case][1] is not None else None,
            "tunables": TUNED["GLIBC_TUNABLES"], "learning_rate": float(LR), "adapter": "rank 16, alpha 32, all linear layers, float32"},
        "rates": rates, "peer_matmul_gflops": peers[-1]["matmul_gflops"],
        "peer_init_seconds": [p["init_seconds"] for p in peers],
        "tokens": tokens, "floor_operations": operations.steps(SHAPES[args.shape], lines, BATCH),
        "sides": sides, "largest_loss_difference": difference, "equal_work": difference <= LOSS_TOLERANCE,
        "speedup": {"medians": sides[1]["median_seconds"] / sides[0]["median_seconds"], "pairs": statistics.median(pairs),
                    "lowest": min(pairs), "highest": max(pairs)},
        "memory_ratio": sides[1]["peak_rss_bytes"] / sides[0]["peak_rss_bytes"],
    }


def best_allocator(runs):
    """The peer's better setting by the newest measurement."""
    found = sorted(runs.glob("*-allocator.json"))
    if not found:
        return "tuned"
    sides = json.loads(found[-1].read_text())["sides"]
    return min(zip(ALLOCATORS, sides), key=lambda pair: pair[1]["median_seconds"])[0]


def save(args, result):
    args.runs.mkdir(parents=True, exist_ok=True)
    path = args.runs / f"{args.date}-{result['case']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"  {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}", flush=True)


def common(parser):
    """Options that the other scripts have too."""
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=ROOT / "target/bench", help="where models and runs go")
    parser.add_argument("--bin", type=Path, default=ROOT / "target/release", help="where our tools are")
    parser.add_argument("--runs", type=Path, default=ROOT / "bench/runs", help="where results go")
    parser.add_argument("--date", default=datetime.date.today().isoformat())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common(parser)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--allocator", choices=ALLOCATORS, help="default: the better one for the peer, of the case allocator")
    parser.add_argument("cases", nargs="+", choices=CASES)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    asked, failed = args.allocator, []
    for case in args.cases:
        print(case, flush=True)
        args.allocator = asked or best_allocator(args.runs)
        try:
            found = run(args, case)
        except SystemExit as error:  # the next case may still work
            failed.append(f"{case}: {error}")
            continue
        save(args, found)
        if not found["equal_work"]:
            failed.append(f"{case}: losses differ by {found['largest_loss_difference']:.1e}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
