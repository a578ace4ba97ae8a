#!/usr/bin/env python3
"""Checks an adapter directory and its merge against PEFT and transformers, in float32 on the CPU.

usage: check-peft.py BASE_DIR ADAPTER_DIR MERGED_DIR

Loads BASE_DIR + ADAPTER_DIR with PEFT and MERGED_DIR (of kto-merge) with transformers and compares the logits; compares
the weights with those of PEFT's own merge. Needs torch, transformers, peft (made with 2.15, 5.23, 0.21.2).
"""
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base_dir, adapter_dir, merged_dir = sys.argv[1:4]
load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
base, merged = load(base_dir), load(merged_dir)
vocabulary = base.config.vocab_size
ids = torch.arange(64).reshape(1, 64) * 7 % vocabulary
with torch.no_grad():
    plain = base(ids).logits
    model = PeftModel.from_pretrained(base, adapter_dir).eval()
    adapted = model(ids).logits
    ours = merged(ids).logits
    theirs = model.merge_and_unload()
    weights = dict(theirs.named_parameters())
    worst = max((p - weights[n]).abs().max().item() for n, p in merged.named_parameters())
print(f"logits: largest {adapted.abs().max():.4g}; adapter against base {(adapted - plain).abs().max():.4g}")
print(f"logits: kto-merge against PEFT, largest difference {(ours - adapted).abs().max():.3g}")
print(f"weights: kto-merge against PEFT's merge, largest difference {worst:.3g}")
