#!/usr/bin/env python3
"""Runs the real KTOTrainer of TRL on cases of testdata/trl and compares, or rewrites, their results.

usage: trl_golden.py [--root DIR] [--write] CASE...

Reads only what a case's meta.json names: model, raw data, initial adapter and settings.
Compares token ids, every logged number of every step, the first gradients and the final adapter;
with --write replaces those files instead. Versions: the README of testdata/trl.
"""
import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import KTOConfig, KTOTrainer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2] / "testdata/trl"
# Largest difference accepted between two runs of the same float32 code on different machines.
RELATIVE, ABSOLUTE = 2e-5, 2e-5


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_config(meta, work):
    """The case's settings in TRL's words."""
    return KTOConfig(
        output_dir=work, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        logging_nan_inf_filter=False, remove_unused_columns=False, optim="adamw_torch", num_train_epochs=meta["epochs"],
        per_device_train_batch_size=meta["bs"], gradient_accumulation_steps=meta["ga"], learning_rate=meta["lr"],
        lr_scheduler_type=meta["sched"], warmup_steps=meta["warmup"], weight_decay=meta["wd"], max_grad_norm=meta["clip"],
        beta=meta["beta"], desirable_weight=meta["dw"], undesirable_weight=meta["uw"], loss_type=meta["loss"],
        max_length=meta["max_length"], precompute_ref_log_probs=meta["precompute"], activation_checkpointing=meta["gc"])


def make_trainer(meta, paths, work):
    """A trainer whose adapter is the case's initial one; the reference is the base or that adapter."""
    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    model = AutoModelForCausalLM.from_pretrained(paths["model"], dtype=torch.float32, attn_implementation="eager")
    common = dict(args=make_config(meta, work), train_dataset=Dataset.from_list(read_lines(paths["data"])),
                  processing_class=tokenizer)
    if meta["ref"] == "init_adapter":
        model = PeftModel.from_pretrained(model, paths["adapter_init"], is_trainable=True)
        return KTOTrainer(model=model, **common)
    lora = LoraConfig.from_pretrained(paths["adapter_init"])
    lora.inference_mode = False
    lora.modules_to_save = meta.get("modules_to_save")
    trainer = KTOTrainer(model=model, peft_config=lora, **common)
    # Modules trained whole begin as the base's.
    whole = get_peft_model_state_dict(trainer.model) if lora.modules_to_save else {}
    set_peft_model_state_dict(trainer.model, whole | load_file(paths["adapter_init"] / "adapter_model.safetensors"))
    return trainer


class Recorder(TrainerCallback):
    """Keeps the log line of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.steps.append(dict(logs))


def first_gradients(trainer, kept):
    """Copies the gradients of the first step into `kept` just before they are clipped."""
    clip = trainer._clip_grad_norm

    def wrapped(model):
        if not kept:
            kept.update({name.replace(".default", ""): p.grad.detach().clone()
                         for name, p in trainer.model.named_parameters() if p.requires_grad})
        return clip(model)
    trainer._clip_grad_norm = wrapped


def run(meta, paths):
    """Trains the case and returns its token ids, steps, first gradients and final adapter."""
    with tempfile.TemporaryDirectory() as work:
        trainer = make_trainer(meta, paths, work)
        rows = [(row["prompt_ids"], row["completion_ids"], bool(row["label"])) for row in trainer.train_dataset]
        recorder, gradients = Recorder(), {}
        trainer.add_callback(recorder)
        first_gradients(trainer, gradients)
        trainer.train()
        return rows, recorder.steps, gradients, get_peft_model_state_dict(trainer.model, adapter_name="default")


def largest(one, two):
    assert one.keys() == two.keys(), "tensor names differ"
    return max((one[name] - two[name]).abs().max().item() for name in one)


def compare(name, paths, rows, steps, gradients, adapter):
    """Prints how far this run is from the golden one; stops at a difference that is no rounding."""
    golden = [(r["prompt_ids"], r["completion_ids"], r["label"]) for r in read_lines(paths["tokenized"])]
    assert rows == golden, "token ids differ"
    expected = read_lines(paths["steps"])
    assert len(steps) == len(expected), f"{len(steps)} steps, expected {len(expected)}"
    worst = 0.0
    for want, got in zip(expected, steps):
        for key in want.keys() - {"step", "epoch_index", "micro_batches"}:
            difference = abs(float(got[key]) - want[key])
            assert difference <= ABSOLUTE + RELATIVE * abs(want[key]), f"step {want['step']} {key}: {got[key]} {want[key]}"
            worst = max(worst, difference / max(1.0, abs(want[key])))
    if "adapter_final" not in paths:
        print(f"{name}: {len(rows)} rows equal, {len(steps)} steps within {worst:.1e}", flush=True)
        return
    by_gradient = largest(load_file(paths["grads_step1"]), gradients)
    by_adapter = largest(load_file(paths["adapter_final"] / "adapter_model.safetensors"), adapter)
    assert by_gradient < 1e-4 and by_adapter < 1e-4, (by_gradient, by_adapter)
    print(f"{name}: {len(rows)} rows equal, {len(steps)} steps within {worst:.1e}, first gradients within {by_gradient:.1e}, "
          f"final adapter within {by_adapter:.1e}", flush=True)


def rewrite(paths, steps, gradients, adapter):
    """Replaces the results, keeping the rows of each step as they are."""
    kept = ("step", "epoch_index", "micro_batches")
    lines = [json.dumps({**{k: old[k] for k in kept}, **new}) for old, new in zip(read_lines(paths["steps"]), steps, strict=True)]
    paths["steps"].write_text("\n".join(lines) + "\n")
    if "adapter_final" not in paths:
        return
    save_file({k: v.contiguous() for k, v in gradients.items()}, paths["grads_step1"])
    save_file({k: v.detach().contiguous() for k, v in adapter.items()}, paths["adapter_final"] / "adapter_model.safetensors",
              metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--write", action="store_true", help="replace the golden results")
    parser.add_argument("case", nargs="+")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    disable_progress_bars()
    for name in args.case:
        meta = json.loads((args.root / name / "meta.json").read_text())
        paths = {key: args.root / path for key, path in meta["files"].items()}
        rows, steps, gradients, adapter = run(meta, paths)
        if args.write:
            rewrite(paths, steps, gradients, adapter)
        else:
            compare(name, paths, rows, steps, gradients, adapter)


if __name__ == "__main__":
    main()
