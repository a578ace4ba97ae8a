#!/usr/bin/env python3
"""kto-quantize beside transformers + bitsandbytes and mlx-lm, kto-merge beside PEFT: time and peak memory on a 1B-shaped bf16 model, in turn.

usage: rewrite.py [--rounds N] [--layers N] [--mlx PYTHON] [--save]

With an interpreter that has numpy, torch, transformers, bitsandbytes and peft; that of --mlx has mlx and mlx-lm (default: the same).

Peer and tool alternate, the first of them another one each round. Ours is timed as a process, of the peer what it does after its
imports (`work`), so that its start does not count for us; processor seconds are those of the whole process. Two peaks of each process:
the resident set (VmHWM), and of it what is anonymous (RssAnon, asked every 5 ms), which mapped weights are not. Ours forces its result to the
disk and hashes it for the manifest, the peers do neither. The floor is a copy: in every round the weights' files are copied through the page cache
in one thread and forced to the disk; what a tool reads and writes, at that rate, against its time. --save writes bench/runs/DATE-rewrite.json.
"""
import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import machine  # noqa: E402
from safetensors_file import Tensor, write_file, write_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "target" / "release"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 2048, "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}
LINEARS = {"self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (512, 2048), "self_attn.v_proj": (512, 2048), "self_attn.o_proj": (2048, 2048),
           "mlp.gate_proj": (8192, 2048), "mlp.up_proj": (8192, 2048), "mlp.down_proj": (2048, 8192)}
RANK = 16
JOBS = ("quantize", "quantize-mlx", "merge")

QUANTIZE = """
import sys, time, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
start = time.perf_counter()
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, device_map="cpu", dtype=torch.bfloat16)
model.save_pretrained(sys.argv[3])
print(time.perf_counter() - start)
"""
MLX = """
import sys, time
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
mx.set_default_device(mx.cpu)
start, out = time.perf_counter(), Path(sys.argv[3])
model, config = load_model(Path(sys.argv[1]), lazy=True)
model, config = quantize_model(model, config, 64, 4)
save_model(out, model, donate_model=True)
save_config(config, out / "config.json")
print(time.perf_counter() - start)
"""
MERGE = """
import sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
print(time.perf_counter() - start)
"""


def bf16(rng, *shape):
    def data():
        for rows in range(0, shape[0], 4096):
            values = rng.standard_normal((min(4096, shape[0] - rows), *shape[1:]), dtype=np.float32) * 0.02
            yield (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return data


def make(folder, layers):
    rng = np.random.default_rng(0)
    model, adapter = folder / "model", folder / "adapter"
    model.mkdir()
    adapter.mkdir()
    (model / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    tensors = [Tensor("model.embed_tokens.weight", "BF16", (128256, 2048), bf16(rng, 128256, 2048)),
               Tensor("model.norm.weight", "BF16", (2048,), bf16(rng, 2048))]
    pairs = []
    for block in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.append(Tensor(f"model.layers.{block}.{norm}.weight", "BF16", (2048,), bf16(rng, 2048)))
        for module, (rows, columns) in LINEARS.items():
            tensors.append(Tensor(f"model.layers.{block}.{module}.weight", "BF16", (rows, columns), bf16(rng, rows, columns)))
            name = f"base_model.model.model.layers.{block}.{module}"
            for side, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                values = rng.standard_normal(shape, dtype=np.float32) * 0.01
                pairs.append(Tensor(f"{name}.lora_{side}.weight", "F32", shape, lambda values=values: [values.tobytes()]))
    write_model(model, tensors)
    write_file(adapter / "adapter_model.safetensors", pairs)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none",
                "target_modules": sorted({m.split(".")[1] for m in LINEARS}), "base_model_name_or_path": None, "inference_mode": True}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return model, adapter, sum(t.bytes for t in tensors)


def run(command):
    """Wall seconds, processor seconds, peak resident and peak anonymous bytes, standard output. The peak that wait4 tells is no less than
    that of this process, so the process is asked every few milliseconds."""
    os.sync()  # What the run before has left unwritten is not this one's to wait for.
    start, resident, anonymous = time.perf_counter(), 0, 0
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while True:
        now = machine.peaks(process.pid)
        resident, anonymous = max(resident, now[0]), max(anonymous, now[1])
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(0.005)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, resident, anonymous, process.stdout.read()


def copy_rate(model, out):
    start, size = time.perf_counter(), 0
    for file in model.glob("*.safetensors"):
        shutil.copyfile(file, out)
        size += file.stat().st_size
    with open(out, "rb+") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    out.unlink()
    return size / seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--mlx", default=sys.executable)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    about, rows = machine.describe(), []
    (ROOT / "target/bench").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "target/bench") as folder:
        folder = Path(folder)
        model, adapter, size = make(folder, args.layers)
        out = folder / "out"
        jobs = {
            ("quantize", "peer"): [sys.executable, "-c", QUANTIZE, model, "-", out],
            ("quantize", "kto"): [BIN / "kto-quantize", "-q", model, "-o", out],
            ("quantize-mlx", "peer"): [args.mlx, "-c", MLX, model, "-", out],
            ("quantize-mlx", "kto"): [BIN / "kto-quantize", "-q", model, "--form", "mlx", "-o", out],
            ("merge", "peer"): [sys.executable, "-c", MERGE, model, adapter, out],
            ("merge", "kto"): [BIN / "kto-merge", "-q", "--base", model, "--adapter", adapter, "-o", out],
        }
        for round_ in range(args.rounds):
            rate = copy_rate(model, folder / "copy")
            for job in JOBS:
                for who in (("peer", "kto"), ("kto", "peer"))[round_ % 2]:
                    wall, cpu, resident, anonymous, said = run(jobs[job, who])
                    work = float(said.split()[-1]) if who == "peer" else wall
                    written = sum(f.stat().st_size for f in out.glob("*.safetensors"))
                    rows.append({"round": round_, "job": job, "who": who, "wall_seconds": wall, "work_seconds": work, "cpu_seconds": cpu,
                                 "peak_rss_bytes": resident, "peak_anonymous_bytes": anonymous, "read_bytes": size, "written_bytes": written,
                                 "copy_bytes_per_second": rate})
                    print(json.dumps(rows[-1]), flush=True)
                    shutil.rmtree(out)
    packages = {sys.executable: ("torch", "transformers", "bitsandbytes", "peft")}
    packages[args.mlx] = packages.get(args.mlx, ()) + ("mlx", "mlx-lm")
    versions = {name: machine.version(python, name) for python, names in packages.items() for name in names}
    result = {"case": "rewrite", "date": datetime.date.today().isoformat(), "revision": machine.revision(), "machine": about,
              "versions": versions, "settings": {"layers": args.layers, "rank": RANK}, "rows": rows}
    for job in JOBS:
        median = lambda who, key: statistics.median(r[key] for r in rows if (r["job"], r["who"]) == (job, who))  # noqa: E731
        print(f"{job}: {median('peer', 'work_seconds') / median('kto', 'wall_seconds'):.1f} times as fast, "
              f"{median('peer', 'peak_anonymous_bytes') / median('kto', 'peak_anonymous_bytes'):.0f} times less anonymous memory")
    if args.save:
        path = ROOT / "bench" / "runs" / f"{result['date']}-rewrite.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"saved as {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
