#!/usr/bin/env python3
"""Runs the kernel microbenchmarks (kernels/benches) and writes bench/runs/DATE-kernels.json.

usage: kernels.py [--threads 2]
"""
import argparse
import json
import os
import subprocess

import machine
from compare import common, save


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common(parser)
    args = parser.parse_args()
    rows = []
    for threads in sorted({1, args.threads}):
        command = [os.environ.get("CARGO", "cargo"), "bench", "-q", "-p", "kto-kernels", "--bench", "kernels", "--", "--json",
                   "--threads", str(threads)]
        out = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=True).stdout
        rows += [json.loads(line) for line in out.splitlines()]
    save(args, {"case": "kernels", "date": args.date, "revision": machine.revision(), "machine": machine.describe(),
                "rates": [machine.rates(n) for n in sorted({1, args.threads})], "rows": rows})


if __name__ == "__main__":
    main()
