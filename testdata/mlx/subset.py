#!/usr/bin/env python3
"""Cuts the golden vectors of MLX down to what the tests need: every number of bits in every dtype, group sizes in turn.
Of the float modes: every mode on random numbers in f32 and on edge cases in bf16.
usage: subset.py affine.safetensors|fp_modes.safetensors OUT.safetensors
"""
import sys
from safetensors import safe_open
from safetensors.torch import save_file

kept, groups = {}, [32, 64, 128]
cases = []
for i, dtype in enumerate(["f32", "bf16", "f16"]):
    for j, bits in enumerate([2, 3, 4, 5, 6, 8]):
        for rows in ["heavy"] + ["edge"] * (dtype == "bf16"):
            cases.append((f"affine.{rows}.{dtype}.b{bits}.g{groups[(i + j) % 3]}", ["packed", "scales", "biases", "dq"]))
for mode in ["mxfp4", "nvfp4", "mxfp8"]:
    for rows in ["rand.f32", "heavy.f32", "edge.bf16"]:
        cases.append((f"{mode}.{rows}", ["packed", "scales", "dq"]))
with safe_open(sys.argv[1], "pt") as golden:
    names = set(golden.keys())
    for case, parts in cases:
        if f"{case}.packed" in names:
            kept |= {f"{case}.{part}": golden.get_tensor(f"{case}.{part}") for part in parts}
save_file(kept, sys.argv[2], metadata={"mlx": "0.32.4"})
