#!/usr/bin/env python3
"""Writes the demo's data: preference pairs, held-out pairs, and held-out prompts for generation.

usage: preferences.py [--out DIR] [--pairs N]
"""
import argparse
import json
from pathlib import Path

import corpus

ROOT = Path(__file__).resolve().parents[2]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "testdata/demo")
    parser.add_argument("--pairs", type=int, default=320)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    held = corpus.held_out()
    write(args.out / "preferences.jsonl", corpus.preferences(args.pairs))
    write(args.out / "heldout.jsonl", [pair for _, pair in held])
    write(args.out / "prompts.jsonl", [{"prompt": pair["prompt"], "answer": fact.sentence} for fact, pair in held])


if __name__ == "__main__":
    main()
