#!/usr/bin/env python3
"""Golden numbers of 8-bit AdamW: cuts 12 recorded steps of bitsandbytes, and runs 200 more on a problem that the test makes again.
usage: adamw8.py bnb_golden.safetensors OUT.safetensors      needs bitsandbytes 0.50 or later and torch
"""
import sys
import bitsandbytes as bnb
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

N, STEPS = 4096, 200
f32, u64 = np.float32, np.uint64


def mix(x):
    """SplitMix64's finalizer (kernels/src/random.rs)."""
    x = x + u64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> u64(30))) * u64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> u64(27))) * u64(0x94D049BB133111EB)
    return x ^ (x >> u64(31))


def noise(stream):
    """N numbers in -0.5 .. 0.5, exact in float32."""
    bits = mix(np.arange(N, dtype=u64) + u64(stream * N)) >> u64(40)
    return bits.astype(f32) / f32(1 << 24) - f32(0.5)


def problem(optimizer_of, scales):
    """A quadratic with curvatures 2^0 .. 2^-7 and a noisy gradient, element i scaled by scales[i % 4]; every operation is one float32
    rounding. Returns the first four blocks: blocks are independent."""
    scale = np.resize(np.array(scales, f32), N)
    start, target = noise(0) * f32(0.1), noise(1) * f32(0.1)
    curvature = np.exp2(-(mix(np.arange(N, dtype=u64) + u64(2 * N)) & u64(7)).astype(f32)).astype(f32)
    p = torch.nn.Parameter(torch.from_numpy(start))
    optimizer = optimizer_of([p])
    for step in range(STEPS):
        gradient = (curvature * (p.detach().numpy() - target) + noise(3 + step) * f32(0.02)) * scale
        p.grad = torch.from_numpy(gradient)
        optimizer.step()
    return p.detach()[:1024].clone()


keep = {}
with safe_open(sys.argv[1], "pt") as golden:
    get = golden.get_tensor
    keep["dynamic_map_unsigned"] = get("dynamic_map_unsigned")
    keep["q8/input"], keep["q8/cuda_codes"] = get("q8/unsigned/input"), get("cuda/q8/unsigned/codes")
    # Blocks are independent: two whole ones and the short last one of 5000 elements.
    part = torch.cat([torch.arange(512), torch.arange(4864, 5000)])
    blocks = torch.tensor([0, 1, 19])
    source = "adamw8/n5000_wd001"
    keep["bits8/p0"], keep["bits8/grads"] = get(f"{source}/p0")[part], get(f"{source}/grads")[:, part]
    for name in ["p_step1", "p_step2", "p_step12", "state1", "state2"]:
        keep[f"bits8/{name}"] = get(f"bnbcpu/{source}/{name}")[part]
    for name in ["absmax1", "absmax2"]:
        keep[f"bits8/{name}"] = get(f"bnbcpu/{source}/{name}")[blocks]
    # A tensor of 4095 elements, whose moments bitsandbytes keeps in float32.
    source = "adamw8/n4095_f32states"
    keep["f32/p0"], keep["f32/grads"] = get(f"{source}/p0")[:256], get(f"{source}/grads")[:, :256]
    for name in ["p_step12", "state1", "state2"]:
        keep[f"f32/{name}"] = get(f"bnbcpu/{source}/{name}")[:256]

settings = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
for name, scales in [("even", [1, 1, 1, 1]), ("wide", [1, 2**-6, 2**-12, 0])]:
    keep[f"{name}/bits8"] = problem(lambda p: bnb.optim.AdamW8bit(p, **settings), scales)
    keep[f"{name}/f32"] = problem(lambda p: torch.optim.AdamW(p, **settings), scales)
save_file({k: v.contiguous().clone() for k, v in keep.items()}, sys.argv[2], metadata={"bitsandbytes": bnb.__version__})
