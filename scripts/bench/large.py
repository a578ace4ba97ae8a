#!/usr/bin/env python3
"""Models that the peer cannot train on this machine: random NF4 models of 7B and 14B shape; writes bench/runs/DATE-CASE.json.

usage: large.py [--steps N] [--sharing paired|unshared] [--layers N] [--threads 2] [--work DIR] CASE…

cases: nf4-7b      Mistral-7B shape, 8 rows of 512 tokens a step, kto-train --memory 7.7GiB: at most 4 GiB beside the mapped weights
       nf4-14b     Qwen2.5-14B shape, 2 rows of 512 tokens a step, kto-train --memory 6GiB

A row is 384 tokens of prompt and 128 of completion. --layers cuts the model, to try the script.
"""
import argparse
import dataclasses
import json

import machine
import solo
from compare import common, save
from shapes import SHAPES

# shape, rows a step, our options.
CASES = {
    "nf4-7b": ("mistral-7b", 8, ["--memory", "7.7GiB"]),
    "nf4-14b": ("qwen2.5-14b", 2, ["--memory", "6GiB"]),
}
PROMPT, COMPLETION = 384, 128


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common(parser)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--sharing", choices=["paired", "unshared"], default="paired")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--memory", help="another --memory than the case's")
    parser.add_argument("cases", nargs="+", choices=CASES)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for case in args.cases:
        name, batch, options = CASES[case]
        options = ["--memory", args.memory] if args.memory else options
        shape = dataclasses.replace(SHAPES[name], layers=args.layers or SHAPES[name].layers)
        model = solo.make_model(args, f"{name}-nf4-{shape.layers}", name, "nf4", shape.layers)
        rows, tokens = solo.make_tokens(args, model, shape.vocab, case, args.steps, batch, args.sharing, PROMPT, COMPLETION)
        rates = [machine.rates(args.threads)]
        # TRL's pairing: one KL completion a row, of the row before.
        run = solo.train(args, model, tokens, args.steps, batch, ["--preset", "trl", *options])
        rates.append(machine.rates(args.threads))
        records = [json.loads(line) for line in rows.read_text().splitlines()]
        save(args, {
            "case": case, "date": args.date, "revision": machine.revision(), "machine": machine.describe(), "rates": rates,
            "settings": {"shape": name, "layers": shape.layers, "parameters": shape.parameters(), "threads": args.threads, "batch": batch,
                         "rows": args.sharing, "prompt": PROMPT, "completion": COMPLETION, "steps": args.steps, "ours": options},
            "weight_bytes": sum(f.stat().st_size for f in model.glob("*.safetensors")),
            "floor_operations": solo.floor(shape, records, batch), **run,
        })


if __name__ == "__main__":
    main()
