"""A run of kto-train alone: what growth.py and large.py measure."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import operations
from contenders import Ours

HERE = Path(__file__).resolve().parent


def make_model(args, name, shape, dtype, layers=None):
    """Writes a random model once; returns its directory."""
    model = args.work / name
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        command = [sys.executable, HERE / "workload.py", "model", model, "--shape", shape, "--dtype", dtype]
        subprocess.run(command + (["--layers", str(layers)] if layers else []), check=True)
    return model


def tokenizer_of(args, model):
    """Returns a directory with the model's tokenizer as it is written: by a qwen2 config, words would be split as Qwen's are."""
    directory = args.work / f"{model.name}-tokenizer"
    directory.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, directory / name)
    config = json.loads((model / "config.json").read_text()) | {"model_type": "llama"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def make_tokens(args, model, vocab, name, steps, batch, sharing, prompt, completion):
    """Writes rows of exactly these lengths and tokenizes them; returns (records file, token file)."""
    rows = args.work / f"{name}.jsonl"
    subprocess.run(
        [sys.executable, HERE / "workload.py", "rows", rows, "--vocab", str(vocab), "--steps", str(steps), "--batch", str(batch),
         "--sharing", sharing, "--prompt", str(prompt), "--completion", str(completion)], check=True)
    tokens = rows.with_suffix(".kto.arrow")
    subprocess.run([args.bin / "kto-tokenize", "-q", "--model", tokenizer_of(args, model), "--max-length", str(prompt + completion + 1), rows,
                    "-o", tokens], check=True)
    return rows, tokens


def train(args, model, tokens, steps, batch, options):
    """Trains and returns the times of the reference pass and of every step, and the peaks of memory."""
    out = args.work / "run-solo"
    shutil.rmtree(out, ignore_errors=True)
    command = [args.bin / "kto-train", "--model", model, "--data", tokens, "--batch", batch, "--max-steps", steps,
               "--threads", args.threads, "--lr", "1e-5", *options]
    run = Ours([str(c) for c in command], out, args.work / "solo.log")
    try:
        run.wait_for(lambda: False)  # until it ends
    finally:
        run.process.kill()
    lines = run.timing()
    return {
        "reference": lines[0], "steps": lines[1:], "total_seconds": run.process.running,
        "peak_rss_bytes": run.process.peak, "peak_anonymous_bytes": run.process.peak_anonymous,
        "losses": [run.metrics(i + 1)["loss"] for i in range(len(lines) - 1)],
    }


def floor(shape, records, batch):
    return [p["total"] for p in operations.steps(shape, records, batch)]
