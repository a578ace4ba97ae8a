#!/usr/bin/env python3
"""4-bit codes and 8-bit rows of bitsandbytes for every block size: blocks.py OUT.safetensors

Inputs are one bf16 matrix (heavy tails, a row of zeros, a large value) of 32 rows; its outputs are kept as SHA-256 only.
Needs torch, bitsandbytes (made with 2.15.0, 0.50.2; CPU back end).
"""
import hashlib
import sys

import bitsandbytes.functional as F
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import save_file

torch.manual_seed(11)
x = torch.randn(32, 512) * torch.randn(32, 512).abs() ** 2 * 0.02
x[3] = 0.01 * torch.arange(512).remainder(7)
x[5, 100] = 40.0
x[8:16] = 0
x[9, 1] = -1e-3
x = x.to(torch.bfloat16)


def digest(tensor):
    raw = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).digest()
    return torch.tensor(list(raw), dtype=torch.uint8)


made = {"input": x}
for kind in ("nf4", "fp4"):
    for block in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        packed, state = F.quantize_4bit(x, blocksize=block, quant_type=kind)
        # The rule without the SIMD kernel, which loses accuracy in large blocks (bitsandbytes itself avoids it from 2048 on).
        values = _dequantize_4bit_compute(packed.reshape(-1), state.absmax, state.code, block, x.shape, x.dtype)
        made[f"{kind}.{block}"] = torch.stack([digest(packed), digest(state.absmax), digest(values)])
    made[f"{kind}.values"] = F.get_4bit_type(kind, device="cpu")
codes, scales, _ = F.int8_vectorwise_quant(x[:8].to(torch.float16))
made["int8.codes"], made["int8.scales"] = codes.view(torch.uint8), scales
save_file(made, sys.argv[1])
