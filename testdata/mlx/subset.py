#!/usr/bin/env python3
"""Cuts the golden vectors of MLX down to what the tests need: every number of bits in every dtype, group sizes in turn.
usage: subset.py affine.safetensors OUT.safetensors
"""
import sys
from safetensors import safe_open
from safetensors.torch import save_file

kept, groups = {}, [32, 64, 128]
with safe_open(sys.argv[1], "pt") as golden:
    for i, dtype in enumerate(["f32", "bf16", "f16"]):
        for j, bits in enumerate([2, 3, 4, 5, 6, 8]):
            for rows in ["heavy"] + ["edge"] * (dtype == "bf16"):
                case = f"affine.{rows}.{dtype}.b{bits}.g{groups[(i + j) % 3]}"
                for part in ["packed", "scales", "biases", "dq"]:
                    kept[f"{case}.{part}"] = golden.get_tensor(f"{case}.{part}")
save_file(kept, sys.argv[2], metadata={"mlx": "0.32.4"})
