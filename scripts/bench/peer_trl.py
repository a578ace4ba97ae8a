#!/usr/bin/env python3
"""The peer: TRL's KTOTrainer with a PEFT LoRA (rank 16, alpha 32, all linear layers) on the CPU in float32.

usage: peer_trl.py --model DIR --rows FILE --adapter DIR [--batch 4] [--steps N] [--threads 2] [--lr 1e-4]
                   [--checkpointing] [--precompute]

Prints JSON lines: {"event": "ready"} before each step, after which a line on standard input starts the step;
{"event": "step", "seconds", "cpu_seconds", "tokens", "loss", "kl"}; at the end {"event": "done", …} with versions and
peak memory. The initial adapter, whose B is not zero so that the first loss says something, is made from a seed and
written to --adapter, so that others can start from it. Everything else that TRL prints goes to standard error.
"""
import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--rows", required=True)
parser.add_argument("--adapter", required=True)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--lr", type=float, default=1e-4)
parser.add_argument("--checkpointing", action="store_true")
parser.add_argument("--precompute", action="store_true")
args = parser.parse_args()

# What is printed for the driver; file descriptor 1 then belongs to the libraries.
events = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
work = tempfile.TemporaryDirectory(prefix="bench-trl-")
os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", CUDA_VISIBLE_DEVICES="", HF_HOME=work.name,
    OMP_NUM_THREADS=str(args.threads), MKL_NUM_THREADS=str(args.threads))

import torch  # noqa: E402

torch.set_num_threads(args.threads)

import datasets  # noqa: E402
import peft  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()


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
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, settings, state, control, **kwargs):
        seconds, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        step = state.global_step
        say("step", step=step, seconds=seconds, cpu_seconds=cpu, tokens=self.tokens[step - 1], loss=self.loss)


def matmul_rate():
    """GFLOP/s of a square float32 product of 1024, the best of some."""
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best / 1e9


def make_trainer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with open(args.rows) as lines:
        rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    settings = trl.KTOConfig(
        output_dir=work.name, use_cpu=True, bf16=False, max_steps=args.steps, per_device_train_batch_size=args.batch,
        learning_rate=args.lr, optim="adamw_torch", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        max_length=16384, activation_checkpointing=args.checkpointing, precompute_ref_log_probs=args.precompute)
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
    gate = Gate([sum(lengths[i * args.batch : (i + 1) * args.batch]) for i in range(args.steps)])
    compute = trainer.compute_loss

    def compute_loss(*a, **k):
        result = compute(*a, **k)
        gate.loss = (result[0] if isinstance(result, tuple) else result).item()
        return result

    trainer.compute_loss = compute_loss
    trainer.add_callback(gate)
    trainer.train()
    versions = {m.__name__: m.__version__ for m in (trl, peft, transformers, torch, datasets)}
    say("done", init_seconds=init, peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        matmul_gflops=matmul_rate(), cpu_capability=torch.backends.cpu.get_cpu_capability(),
        versions={"python": platform.python_version(), **versions})


if __name__ == "__main__":
    main()
