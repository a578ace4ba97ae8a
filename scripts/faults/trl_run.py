#!/usr/bin/env python3
"""One run of TRL's KTOTrainer for peers.py: LoRA with dropout, cosine schedule, a checkpoint each step, on the CPU.

usage: trl_run.py --model DIR --rows FILE --out DIR [--resume] [--epochs 2.5] [--batch 4]

Prints JSON lines: {"event": "step", "step"} after each step; {"event": "done", "versions"}. The final adapter is in
OUT/final, the loss of every step in OUT/losses.json. --resume goes on from the checkpoint that transformers finds last.
"""
import argparse
import json
import os
import platform
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--rows", required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--epochs", type=float, default=2.5)
parser.add_argument("--batch", type=int, default=4)
args = parser.parse_args()

# What is printed for the driver; file descriptor 1 then belongs to the libraries.
events = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", CUDA_VISIBLE_DEVICES="",
                  OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HOME=str(args.out.parent / "hf"))

import torch  # noqa: E402

torch.set_num_threads(1)

import datasets  # noqa: E402
import peft  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402


def say(event, **fields):
    events.write(json.dumps({"event": event, **fields}) + "\n")
    events.flush()


class Steps(transformers.TrainerCallback):
    def on_step_end(self, settings, state, control, **kwargs):
        say("step", step=state.global_step)


def main():
    transformers.set_seed(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with open(args.rows) as lines:
        rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    settings = trl.KTOConfig(
        output_dir=str(args.out), use_cpu=True, bf16=False, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch,
        learning_rate=2e-3, lr_scheduler_type="cosine", optim="adamw_torch", logging_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=2, report_to=[], disable_tqdm=True, disable_dropout=False, seed=1)
    lora = peft.LoraConfig(r=64, lora_alpha=64, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl.KTOTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.add_callback(Steps())
    last = get_last_checkpoint(str(args.out)) if args.resume and args.out.exists() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.model.save_pretrained(args.out / "final")
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    (args.out / "losses.json").write_text(json.dumps(losses))
    versions = {m.__name__: m.__version__ for m in (trl, peft, transformers, torch)}
    say("done", versions={"python": platform.python_version(), **versions})


if __name__ == "__main__":
    sys.exit(main())
