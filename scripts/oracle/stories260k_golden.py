#!/usr/bin/env python3
"""Checks or rewrites the golden numbers of testdata/stories260k with transformers.

usage: stories260k_golden.py [--write] [MODEL_DIR]

Greedy-decodes 40 ids after "Once upon a time" in float32 and compares ids and
logits with golden_ids_40.json and golden_logits_40.safetensors.
"""
import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 40
HERE = Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=HERE / "testdata/stories260k")
    parser.add_argument("--write", action="store_true", help="replace the golden files")
    args = parser.parse_args()

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        ids = model.generate(prompt, max_length=LENGTH, do_sample=False)[:, :LENGTH]
        logits = model(ids).logits[0].contiguous()
    print(tokenizer.decode(ids[0], skip_special_tokens=True))

    ids_file = args.model / "golden_ids_40.json"
    logits_file = args.model / "golden_logits_40.safetensors"
    if args.write:
        ids_file.write_text(json.dumps(ids[0].tolist()) + "\n")
        save_file({"logits": logits}, logits_file)
        return
    assert ids[0].tolist() == json.loads(ids_file.read_text()), "greedy ids differ"
    difference = (logits - load_file(logits_file)["logits"]).abs().max().item()
    print(f"ids equal; logits differ by at most {difference:.2e}")
    assert difference < 1e-3


if __name__ == "__main__":
    main()
