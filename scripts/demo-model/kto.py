#!/usr/bin/env python3
"""The demo's recipe run by TRL's KTOTrainer: the yardstick for what kto-train should reach.

usage: kto.py [--model DIR] [--lr X] [--batch N] [--epochs N] [--beta X] [--rank N]
"""
import argparse
import random
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

import check
import corpus

ROOT = Path(__file__).resolve().parents[2]


def unpaired(pairs, seed):
    """Both completions of every pair, pairs in a seeded order, the two next to each other."""
    pairs = list(pairs)
    random.Random(seed).shuffle(pairs)
    return [{"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
            for pair in pairs for name in ("chosen", "rejected")]


def logps(model, tokenizer, row):
    """Sum of the completion's log-probs."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    start = len(tokenizer(prompt).input_ids)
    ids = tokenizer(whole, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0, start - 1:-1].log_softmax(-1)
    return logits.gather(-1, ids[0, start:, None]).sum().item()


def accuracy(model, tokenizer, pairs):
    """Share of pairs whose chosen completion has the higher reward."""
    hits = 0
    for pair in pairs:
        rewards = []
        for name in ("chosen", "rejected"):
            row = {"prompt": pair["prompt"], "completion": pair[name]}
            policy = logps(model, tokenizer, row)
            with model.disable_adapter():
                rewards.append(policy - logps(model, tokenizer, row))
        hits += rewards[0] > rewards[1]
    return hits / len(pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "testdata/demo/model")
    parser.add_argument("--pairs", type=int, default=320)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    before = check.score(model, tokenizer)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as work:
        config = KTOConfig(
            output_dir=work, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
            gradient_checkpointing=False, per_device_train_batch_size=args.batch, num_train_epochs=args.epochs,
            learning_rate=args.lr, beta=args.beta, max_length=256, logging_steps=10, seed=args.seed)
        trainer = KTOTrainer(
            model=model, args=config, processing_class=tokenizer,
            train_dataset=Dataset.from_list(unpaired(corpus.preferences(args.pairs), args.seed)),
            peft_config=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        start = time.time()
        trainer.train()
        seconds = time.time() - start
    after = check.score(trainer.model, tokenizer, 12)
    share = accuracy(trainer.model, tokenizer, [pair for _, pair in corpus.held_out()])
    print(f"{vars(args)}\n{trainer.state.global_step} steps, {seconds:.0f} s; right {before[0]} -> {after[0]}, "
          f"polite {before[1]} -> {after[1]} of {after[2]}; reward accuracy {share:.3f}")


if __name__ == "__main__":
    main()
