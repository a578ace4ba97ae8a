#!/usr/bin/env python3
"""How our step grows with the length of a row; writes bench/runs/DATE-growth.json.

usage: growth.py [--lengths 256,512,…] [--steps N] [--shape NAME] [--threads 2] [--work DIR]

Batches of one row, three quarters prompt, one quarter completion, no prompt twice. Linear layers cost a time in
proportion to the tokens, attention in proportion to their square; the fit seconds = a + b·n + c·n² has relative weights,
and so has memory = m + k·n. The first step of a run is not counted.
"""
import argparse
import json
import statistics

import machine
import solo
from compare import common, save
from shapes import SHAPES


def fit(points, powers):
    """Least squares of the relative residuals: returns the coefficients and the relative residuals."""
    rows = [[x**p / y for p in powers] for x, y in points]
    n = len(powers)
    # Normal equations, scaled so that the columns are alike, solved by elimination.
    scale = [sum(r[i] ** 2 for r in rows) ** 0.5 for i in range(n)]
    a = [[sum(r[i] * r[j] for r in rows) / scale[i] / scale[j] for j in range(n)] + [sum(r[i] for r in rows) / scale[i]] for i in range(n)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(a[k][i]))
        a[i], a[pivot] = a[pivot], a[i]
        for k in range(n):
            if k != i:
                factor = a[k][i] / a[i][i]
                a[k] = [x - factor * y for x, y in zip(a[k], a[i])]
    coefficients = [a[i][n] / a[i][i] / scale[i] for i in range(n)]
    residuals = [sum(c * x**p for c, p in zip(coefficients, powers)) / y - 1 for x, y in points]
    return coefficients, residuals


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common(parser)
    parser.add_argument("--lengths", default="256,512,1024,2048,4096,8192")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[args.shape]
    model = solo.make_model(args, args.shape, args.shape, "float32")
    rates, points = machine.rates(args.threads), []
    for n in map(int, args.lengths.split(",")):
        rows, tokens = solo.make_tokens(args, model, shape.vocab, f"growth-{n}", args.steps, 1, "unshared", n - n // 4, n // 4)
        run = solo.train(args, model, tokens, args.steps, 1, [])
        records = [json.loads(line) for line in rows.read_text().splitlines()]
        seconds = [s["seconds"] for s in run["steps"]]
        assert all(s["tokens"] == n for s in run["steps"]), "a row has another length"
        point = {"tokens": n, "median_seconds": statistics.median(seconds[1:]), **run,
                 "floor_operations": solo.floor(shape, records, 1)}
        points.append(point)
        print(f"  {n} tokens: {point['median_seconds']:.2f} s, {run['peak_rss_bytes'] / 2**20:.0f} MiB", flush=True)
    time = fit([(p["tokens"], p["median_seconds"]) for p in points], (0, 1, 2))
    memory = fit([(p["tokens"], p["peak_rss_bytes"]) for p in points], (0, 1))
    save(args, {
        "case": "growth", "date": args.date, "revision": machine.revision(), "machine": machine.describe(), "rates": [rates],
        "settings": {"shape": args.shape, "threads": args.threads, "batch": 1, "steps": args.steps, "ours": []},
        "points": points, "time_fit": dict(zip(("coefficients", "residuals"), time)),
        "memory_fit": dict(zip(("coefficients", "residuals"), memory)),
    })


if __name__ == "__main__":
    main()
