#!/usr/bin/env python3
"""Writes an NF4 model (double quantization) of a given shape: random codes and scales, or holes instead of weights.

usage: models.py DIR --shape NAME [--layers N] [--holes]

Standard library only, gigabytes a second: the random bytes are pieces of one pool of 32 MiB. With --holes the files have their headers
and their length but take no room on the disk; that is enough for `kto-train --dry-run`.
"""
import argparse
import dataclasses
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import decoder
import nf4
from safetensors_file import Tensor
from shapes import SHAPES

POOL = 32 << 20


class Pool:
    """Random bytes, used again and again from random places."""

    def __init__(self, numbers, data):
        self.numbers, self.data = numbers, memoryview(data)

    def draw(self, n):
        while n > 0:
            start = self.numbers.randrange(len(self.data) // 2) & ~1
            piece = self.data[start:start + n]
            n -= len(piece)
            yield piece


def bf16_noise(numbers, n):
    """Values of n bytes in bf16, of either sign, between 0.008 and 0.031."""
    out = bytearray(n)
    out[0::2] = numbers.randbytes(n // 2)
    # Sign and the upper seven bits of the exponent.
    out[1::2] = numbers.randbytes(n // 2).translate(bytes([0x3C, 0xBC] * 128))
    return bytes(out)


def write(directory, shape, holes=False, seed=0):
    numbers = random.Random(seed)
    if holes:
        codes = noise = lambda n: None
    else:
        codes = Pool(numbers, numbers.randbytes(POOL)).draw
        noise = Pool(numbers, bf16_noise(numbers, POOL)).draw
    one = b"\x80\x3f"

    def dense(name, dims, mean, std):
        tensor = Tensor(name, "BF16", dims, None)
        tensor.data = (lambda: [one * dims[0]]) if mean else lambda: noise(tensor.bytes)
        return tensor

    linear = lambda name, outputs, inputs: nf4.weight(name, outputs, inputs, codes, 0.02)
    decoder.write(directory, shape, decoder.tensors(shape, dense, linear), "bfloat16", True)


def of(name, layers=None):
    shape = SHAPES[name]
    return dataclasses.replace(shape, layers=layers or shape.layers)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--holes", action="store_true")
    args = parser.parse_args()
    write(args.directory, of(args.shape, args.layers), args.holes)


if __name__ == "__main__":
    main()
