#!/usr/bin/env python3
"""Reduces the golden set to its inputs and the SHA-256 of every output: digests.py affine.safetensors digests.safetensors"""
import hashlib
import sys

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file
import torch

made = {}
with safe_open(sys.argv[1], "pt") as golden:
    names = sorted(golden.keys())
    for name in names:
        if name.startswith("in."):
            made[name] = golden.get_tensor(name)
        elif name.endswith(".packed"):
            case = name.removesuffix(".packed")
            parts = [golden.get_tensor(f"{case}.{part}") for part in ("packed", "scales", "biases", "dq")]
            sums = [hashlib.sha256(part.contiguous().view(torch.uint8).numpy().tobytes()).digest() for part in parts]
            made[f"sha256.{case}"] = torch.from_numpy(np.frombuffer(b"".join(sums), dtype=np.uint8).copy()).reshape(4, 32)
save_file(made, sys.argv[2])
