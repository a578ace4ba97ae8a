#!/usr/bin/env python3
"""Checks a directory of kto-quantize against transformers + bitsandbytes.

usage: check-bnb.py MODEL_DIR QUANTIZED_DIR [PEER_DIR]

Loads QUANTIZED_DIR with transformers on the CPU, quantizes MODEL_DIR with bitsandbytes on the fly, and compares the
logits of the two. With PEER_DIR (a directory that transformers + bitsandbytes saved) also compares every tensor.
Needs torch, transformers, bitsandbytes (made with 2.15, 5.23, 0.50.2).
"""
import json
import sys

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

source, ours = sys.argv[1:3]
torch.manual_seed(0)
with open(f"{ours}/config.json") as file:
    config = json.load(file)
quantization = config["quantization_config"]
mine = AutoModelForCausalLM.from_pretrained(ours, device_map="cpu")
theirs = AutoModelForCausalLM.from_pretrained(
    source,
    device_map="cpu",
    dtype=mine.dtype,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quantization["bnb_4bit_use_double_quant"],
        bnb_4bit_compute_dtype=getattr(torch, quantization["bnb_4bit_compute_dtype"]),
        llm_int8_skip_modules=quantization["llm_int8_skip_modules"],
    ),
)
ids = torch.arange(40).reshape(1, 40) * 5 % config["vocab_size"]
with torch.no_grad():
    a, b = mine(ids).logits.float(), theirs(ids).logits.float()
print(f"linear layers: {type(mine.model.layers[0].mlp.up_proj).__name__}; largest logit {b.abs().max():.4g}")
print(f"largest difference of logits, ours loaded against bitsandbytes' own: {(a - b).abs().max():.4g}")

if len(sys.argv) > 3:
    counts = {"equal": 0, "different": []}
    with safe_open(f"{ours}/model.safetensors", "pt") as x, safe_open(f"{sys.argv[3]}/model.safetensors", "pt") as y:
        assert sorted(x.keys()) == sorted(y.keys()), "different tensor names"
        for name in x.keys():
            s, t = x.get_tensor(name), y.get_tensor(name)
            if s.dtype == t.dtype and s.shape == t.shape and torch.equal(s, t):
                counts["equal"] += 1
            else:
                counts["different"].append(name)
                text = [bytes(v.numpy()).decode() if name.endswith("nf4") else v.flatten()[:8] for v in (s, t)]
                print("different:", name, *text)
    print(f"tensors equal: {counts['equal']}, different: {len(counts['different'])}")
