#!/usr/bin/env python3
"""Writes what a benchmark trains: a random model of a given shape, and rows of random words.

usage: workload.py model DIR [--shape NAME] [--dtype float32|bfloat16|nf4] [--layers N]
       workload.py rows FILE [--vocab V] [--steps N] [--batch N] [--sharing paired|unshared]
                             [--prompt A-B] [--completion A-B] [--seed N]

A word is a token (a WordLevel tokenizer that splits at spaces), so text and ids are the same thing. Rows are records of
prompt, completion, label; paired: a prompt has a chosen row and then a rejected one; unshared: each prompt has one row.
Everything follows from the seed. nf4 is written directly in bitsandbytes' form: random codes, nothing is quantized.
"""
import argparse
import dataclasses
import json
import random
from pathlib import Path

import decoder
import nf4
from safetensors_file import Tensor
from shapes import SHAPES


def write_model(directory, shape, dtype, seed):
    import numpy as np

    stored = "float32" if dtype == "float32" else "bfloat16"
    numbers = np.random.SeedSequence(seed)
    fresh = lambda: np.random.default_rng(numbers.spawn(1)[0])

    def bytes_of(values):
        values = values.astype("<f4")
        # Cut, not rounded: the values are random anyway.
        return values.tobytes() if stored == "float32" else (values.view("<u4") >> 16).astype("<u2").tobytes()

    def dense(name, dims, mean, std):
        rng, kind = fresh(), {"float32": "F32", "bfloat16": "BF16"}[stored]
        # In pieces of 4096 rows: a head of 14B shape is 3 GB in float32.
        heights = [min(4096, dims[0] - at) for at in range(0, dims[0], 4096)]
        normal = lambda rows: rng.standard_normal((rows, *dims[1:]), np.float32)
        return Tensor(name, kind, dims, lambda: (bytes_of(normal(rows) * std + mean) for rows in heights))

    def linear(name, outputs, inputs):
        if dtype == "nf4":
            rng = fresh()
            return nf4.weight(name, outputs, inputs, lambda n: [rng.bytes(n)], 0.02)
        return [dense(name, (outputs, inputs), 0.0, 0.02)]

    decoder.write(directory, shape, decoder.tensors(shape, dense, linear), stored, dtype == "nf4")


def rows(vocab, steps, batch, sharing, prompt, completion, seed):
    """Returns the records. Lengths count tokens; a completion's last token is the end of text, which tokenizing adds."""
    draw = random.Random(seed)
    words = lambda n: " ".join(f"w{draw.randrange(vocab - 2)}" for _ in range(n))
    records = []
    while len(records) < steps * batch:
        text = words(draw.randint(*prompt))
        labels = (True, False) if sharing == "paired" else (len(records) % 2 == 0,)
        for label in labels:
            # The space at the end keeps the end of text apart from the last word.
            records.append({"prompt": text, "completion": " " + words(draw.randint(*completion) - 1) + " ", "label": label})
    return records[: steps * batch]


def span(text):
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = parser.add_subparsers(dest="what", required=True)
    model = sub.add_parser("model")
    model.add_argument("directory", type=Path)
    model.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    model.add_argument("--dtype", choices=["float32", "bfloat16", "nf4"], default="float32")
    model.add_argument("--layers", type=int)
    model.add_argument("--seed", type=int, default=0)
    data = sub.add_parser("rows")
    data.add_argument("file", type=Path)
    data.add_argument("--vocab", type=int, default=49152)
    data.add_argument("--steps", type=int, default=6)
    data.add_argument("--batch", type=int, default=4)
    data.add_argument("--sharing", choices=["paired", "unshared"], default="paired")
    data.add_argument("--prompt", type=span, default=(224, 288))
    data.add_argument("--completion", type=span, default=(64, 128))
    data.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "model":
        shape = SHAPES[args.shape]
        write_model(args.directory, dataclasses.replace(shape, layers=args.layers or shape.layers), args.dtype, args.seed)
    else:
        records = rows(args.vocab, args.steps, args.batch, args.sharing, args.prompt, args.completion, args.seed)
        args.file.write_text("".join(json.dumps(r) + "\n" for r in records))


if __name__ == "__main__":
    main()
