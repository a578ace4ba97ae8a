#!/usr/bin/env python3
"""One run of mlx_lm.lora for peers.py: LoRA with dropout, cosine schedule, weights saved each iteration, on the CPU.

usage: mlx_run.py --model DIR --rows FILE --out DIR [--resume] [--iterations 60] [--batch 4]

mlx_lm.lora has no KTO: the rows are trained as conversations. --resume does what it offers: --resume-adapter-file with the
newest saved weights, and the iterations that are left. Events and files as in trl_run.py.
"""
import argparse
import json
import os
import platform
import shutil
import sys
import types
from importlib.metadata import version
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--rows", required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--iterations", type=int, default=60)
parser.add_argument("--batch", type=int, default=4)
args = parser.parse_args()

# What is printed for the driver; file descriptor 1 then belongs to the libraries.
events = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HOME=str(args.out.parent / "hf"))

import mlx.core as mx  # noqa: E402
from mlx_lm import lora  # noqa: E402
from mlx_lm.tuner.callbacks import TrainingCallback  # noqa: E402

mx.set_default_device(mx.cpu)


def say(event, **fields):
    events.write(json.dumps({"event": event, **fields}) + "\n")
    events.flush()


class Steps(TrainingCallback):
    """Reports every iteration and writes its loss down at once; a resumed process counts on."""

    def __init__(self, before, path):
        self.before, self.path = before, path

    def on_train_loss_report(self, train_info):
        step = self.before + train_info["iteration"]
        with open(self.path, "a") as file:
            file.write(json.dumps([step, train_info["train_loss"]]) + "\n")
        say("step", step=step)

    def on_val_loss_report(self, val_info):
        pass


def conversations():
    """Writes the rows as mlx_lm reads them; returns the folder."""
    folder = args.out.parent / "mlx-data"
    if not folder.exists():
        with open(args.rows) as lines:
            rows = [json.loads(line) for line in lines]
        text = "".join(json.dumps({"messages": row["prompt"] + row["completion"]}) + "\n" for row in rows)
        folder.mkdir()
        for name in ("train", "valid"):
            (folder / f"{name}.jsonl").write_text(text)
    return folder


def main():
    saved = args.out / "adapter"
    found = sorted(saved.glob("0*_adapters.safetensors")) if args.resume and saved.exists() else []
    before = int(found[-1].name.split("_")[0]) if found else 0
    saved.mkdir(parents=True, exist_ok=True)
    config = {
        **lora.CONFIG_DEFAULTS, "model": args.model, "train": True, "data": str(conversations()), "optimizer": "adamw", "num_layers": -1,
        "batch_size": args.batch, "iters": args.iterations - before, "val_batches": 1, "learning_rate": 2e-3, "steps_per_report": 1,
        "steps_per_eval": 10**6, "save_every": 1, "adapter_path": str(saved), "seed": 1,
        "resume_adapter_file": str(found[-1]) if found else None, "lora_parameters": {"rank": 64, "dropout": 0.1, "scale": 1.0},
        "lr_schedule": {"name": "cosine_decay", "arguments": [2e-3, args.iterations]}}
    if config["iters"] > 0:
        # run() does not pass on the callback that it is given.
        steps = Steps(before, args.out / "losses.jsonl")
        lora.get_reporting_callbacks = lambda *a, **k: steps
        lora.run(types.SimpleNamespace(**config))
    (args.out / "final").mkdir(exist_ok=True)
    shutil.copyfile(saved / "adapters.safetensors", args.out / "final" / "adapters.safetensors")
    losses = [json.loads(line) for line in (args.out / "losses.jsonl").read_text().splitlines()]
    (args.out / "losses.json").write_text(json.dumps(dict(losses)))
    say("done", versions={"python": platform.python_version(), "mlx_lm": version("mlx-lm"), "mlx": version("mlx")})


if __name__ == "__main__":
    sys.exit(main())
