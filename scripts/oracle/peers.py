#!/usr/bin/env python3
"""Reads what `make demo` left with the peers' own loaders and compares the numbers.

usage: peers.py [DEMO_OUT]

- the 4-bit directory in transformers, dequantized by bitsandbytes, and the adapter on it in PEFT: log-probs of the
  held-out rows against kto-eval score;
- the merged directory in transformers: greedy answers against kto-eval generate;
- the token file in pyarrow.
"""
import json
import sys
from pathlib import Path

import pyarrow as pa
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-3  # nats on a sum of some ten log-probs, float32 against float32


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_tokens(path):
    """Rows of an Arrow stream of token ids."""
    with pa.ipc.open_stream(path) as reader:
        return reader.read_all().to_pylist()


def logp(model, row):
    """Sum of the completion's log-probs."""
    start = len(row["prompt_ids"])
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, start - 1:-1].float().log_softmax(-1)
    return logits.gather(-1, ids[0, start:, None]).sum().item()


def exactly(model):
    """Lets a 4-bit model compute in float32: transformers would run it in bfloat16, whatever dtype says."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.float()


def answers(model, tokenizer, prompts):
    """Greedy answers to conversations."""
    texts = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=64, do_sample=False)
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
    return texts


def main():
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo-out"
    torch.set_num_threads(1)
    rows = read_tokens(out / "heldout.kto.arrow")
    scores = [line for line in read_lines(out / "scores.jsonl") if "logps" in line]
    assert len(rows) == len(scores), (len(rows), len(scores))

    model = AutoModelForCausalLM.from_pretrained(out / "model-4bit", dtype=torch.float32)
    exactly(model)
    model = PeftModel.from_pretrained(model, out / "run/adapter").eval()
    policy = max(abs(logp(model, row) - score["logps"]) for row, score in zip(rows, scores))
    with model.disable_adapter():
        reference = max(abs(logp(model, row) - score["reference_logps"]) for row, score in zip(rows, scores))
    print(f"4-bit base in bitsandbytes: log-probs of {len(rows)} rows within {reference:.1e}; "
          f"with the adapter in PEFT: within {policy:.1e}")
    assert max(policy, reference) < TOLERANCE

    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    ours = [line["completion"] for line in read_lines(out / "merged.jsonl")]
    theirs = answers(merged, tokenizer, read_lines(ROOT / "testdata/demo/prompts.jsonl"))
    same = sum(one == two for one, two in zip(ours, theirs, strict=True))
    print(f"merged model in transformers: {same} of {len(theirs)} greedy answers equal")
    assert same == len(theirs)


if __name__ == "__main__":
    main()
