#!/usr/bin/env python3
"""Cuts the golden vectors of bitsandbytes down to what the tests need.
usage: subset.py bnb_golden.safetensors OUT.safetensors
"""
import sys
from safetensors import safe_open
from safetensors.torch import save_file

keep = {}
with safe_open(sys.argv[1], "pt") as golden:
    cases = {name.split("/")[0] for name in golden.keys() if name.count("/") == 1 and name.endswith("/input")}
    cases -= {"rand_bf16_256x256"}
    for name in golden.keys():
        parts = name.split("/")
        case = parts[0] if parts[-1] == "input" else parts[1] if len(parts) > 2 else None
        big = case == "rand_bf16_300x70" and parts[-1].startswith("dequant")
        if case in cases and not big and not parts[-1].startswith("dequant_nested") and parts[-1] != "dequant_float16":
            keep[name] = golden.get_tensor(name)
        elif name == "dynamic_map_signed":
            keep[name] = golden.get_tensor(name)
save_file(keep, sys.argv[2], metadata={"bitsandbytes": "0.50.2"})
