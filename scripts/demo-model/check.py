#!/usr/bin/env python3
"""Reads a demo model's answers to the held-out questions: how many are right, how many polite.

usage: check.py [--model DIR] [--adapter DIR] [--show N]
"""
import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus

ROOT = Path(__file__).resolve().parents[2]


def is_polite(text):
    return text.startswith(corpus.OPENERS) and text.endswith(corpus.CLOSERS)


def is_right(text, fact):
    return fact.sentence in text or text.startswith(fact.short)


def generate(model, tokenizer, question, tokens=48):
    """Greedy answer to one question."""
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)


def score(model, tokenizer, show=0):
    """Returns (right, polite, asked) over the held-out questions."""
    model.eval()
    right = polite = 0
    held = corpus.held_out()
    for i, (fact, pair) in enumerate(held):
        question = pair["prompt"][0]["content"]
        text = generate(model, tokenizer, question)
        right += is_right(text, fact)
        polite += is_polite(text)
        if i < show or not is_right(text, fact):
            print(f"  {'' if is_right(text, fact) else 'WRONG '}{question} -> {text}")
    return right, polite, len(held)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "testdata/demo/model")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--show", type=int, default=12)
    args = parser.parse_args()

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, args.adapter)
    right, polite, asked = score(model, tokenizer, args.show)
    print(f"right {right}/{asked}, polite {polite}/{asked}")


if __name__ == "__main__":
    main()
