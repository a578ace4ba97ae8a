#!/usr/bin/env python3
"""Writes blocks of every block form of ggml that is read, and what the gguf package decodes them to.

    pip install gguf==0.19.0 safetensors
    scripts/oracle/gguf_blocks.py testdata/gguf/blocks.safetensors

TYPE: bytes of six blocks, random but for their half-precision numbers, which are finite and of usual size; TYPE.values: f32.
"""
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize
from safetensors.numpy import save_file

BLOCKS = 6
# Where a block's half-precision numbers are.
HALVES = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82], T.Q3_K: [108],
    T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208], T.IQ4_NL: [0], T.IQ4_XS: [0],
}
random = np.random.default_rng(7)
tensors = {}
for kind, places in HALVES.items():
    values, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
    for place in places:
        halves = (random.standard_normal(BLOCKS) * 10.0 ** random.uniform(-6, 0, BLOCKS)).astype(np.float16)
        blocks[:, place:place + 2] = halves.view(np.uint8).reshape(BLOCKS, 2)
    tensors[kind.name] = blocks
    tensors[kind.name + ".values"] = dequantize(blocks, kind).astype(np.float32).reshape(BLOCKS, values)
save_file(tensors, sys.argv[1])
