#!/usr/bin/env python3
"""The peer on a GPU: TRL's KTOTrainer on a bitsandbytes NF4 model with a PEFT LoRA (rank 16, alpha 32, all linear layers), bf16.

usage: peer_trl.py --model DIR --rows FILE --adapter DIR --batch N --steps N [--lr X] [--device cuda|cpu] [--checkpointing]

Its protocol is that of scripts/bench/peer_trl.py. Reference log-probabilities are computed beforehand, attention is torch's fused one, the
optimizer torch's fused AdamW: its best settings. Without --checkpointing it keeps all activations, which is faster and takes more memory.
"""
import argparse
import json
import os
import platform
import sys
import tempfile
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--rows", required=True)
parser.add_argument("--adapter", required=True)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--lr", type=float, default=1e-5)
parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
parser.add_argument("--checkpointing", action="store_true")
args = parser.parse_args()

# What is printed for the driver; file descriptor 1 then belongs to the libraries.
events = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
work = tempfile.TemporaryDirectory(prefix="gpu-trl-")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", HF_HOME=work.name)

import torch  # noqa: E402
import bitsandbytes  # noqa: E402
import datasets  # noqa: E402
import peft  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
on_gpu = args.device == "cuda"


def say(event, **fields):
    events.write(json.dumps({"event": event, **fields}) + "\n")
    events.flush()


class Gate(transformers.TrainerCallback):
    """Waits before each step and reports it afterwards."""

    def __init__(self, tokens):
        self.tokens, self.loss, self.began = tokens, None, None

    def on_step_begin(self, settings, state, control, **kwargs):
        say("ready")
        sys.stdin.readline()
        self.began = time.perf_counter()

    def on_step_end(self, settings, state, control, **kwargs):
        if on_gpu:
            torch.cuda.synchronize()
        step = state.global_step
        say("step", step=step, seconds=time.perf_counter() - self.began, tokens=self.tokens[step - 1], loss=self.loss)


def make_trainer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, device_map={"": 0 if on_gpu else "cpu"}, attn_implementation="sdpa")
    with open(args.rows) as lines:
        rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    settings = trl.KTOConfig(
        output_dir=work.name, use_cpu=not on_gpu, bf16=True, max_steps=args.steps, per_device_train_batch_size=args.batch,
        learning_rate=args.lr, optim="adamw_torch_fused" if on_gpu else "adamw_torch", logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, max_length=32768, activation_checkpointing=args.checkpointing, precompute_ref_log_probs=True)
    lora = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl.KTOTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=numbers) * (0.04 if "lora_A" in name else 0.01))
    return trainer


def main():
    began = time.perf_counter()
    trainer = make_trainer()
    init = time.perf_counter() - began
    trainer.model.save_pretrained(args.adapter)
    lengths = [len(p) + len(c) for p, c in zip(trainer.train_dataset["prompt_ids"], trainer.train_dataset["completion_ids"])]
    gate = Gate([sum(lengths[i * args.batch:(i + 1) * args.batch]) for i in range(args.steps)])
    compute = trainer.compute_loss

    def compute_loss(*a, **k):
        result = compute(*a, **k)
        # Read when the step is over: reading it here would make the host wait.
        gate.latest = (result[0] if isinstance(result, tuple) else result).detach()
        return result

    end = gate.on_step_end

    def on_step_end(*a, **k):
        gate.loss = gate.latest.item()
        return end(*a, **k)

    trainer.compute_loss, gate.on_step_end = compute_loss, on_step_end
    trainer.add_callback(gate)
    trainer.train()
    modules = (trl, peft, transformers, torch, datasets, bitsandbytes)
    say("done", init_seconds=init, peak_device_bytes=torch.cuda.max_memory_reserved() if on_gpu else None,
        versions={"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}})


if __name__ == "__main__":
    main()
