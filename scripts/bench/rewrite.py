#!/usr/bin/env python3
"""kto-quantize against transformers + bitsandbytes, kto-merge against PEFT: time and peak memory on a 1B-shaped bf16 model, in turn.

usage: rewrite.py [--rounds N] [--layers N] [--save FILE]     (PYTHON: an interpreter with torch, transformers, bitsandbytes, peft)

Peer and tool alternate. Ours is timed as a process; of the peer what it does after its imports is counted too (`work`), so that its start
does not count for us; processor seconds are those of the whole process. Peak memory is the resident set. A copy of the weights' bytes in one thread (read and write through the page cache)
is timed in every round: the share of that rate which a tool reaches says how far from the machine's limit it is.
"""
import argparse
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

QUANTIZE = """
import sys, time, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
start = time.perf_counter()
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, device_map="cpu", dtype=torch.bfloat16)
model.save_pretrained(sys.argv[3])
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


def high_water(pid):
    """The largest resident set of a process so far in MiB, or 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0


def run(command):
    """Wall seconds, processor seconds, peak resident MiB, standard output. The peak that wait4 tells is no less than that of this process,
    so the process is asked every few milliseconds."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while True:
        peak = max(peak, high_water(process.pid))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(0.005)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak, process.stdout.read()


def copy_rate(model, out):
    start, size = time.perf_counter(), 0
    for file in model.glob("*.safetensors"):
        shutil.copyfile(file, out)
        size += file.stat().st_size
    with open(out, "rb+") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    out.unlink()
    return size / seconds / 1e9


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    python = os.environ.get("PYTHON", sys.executable)
    rows = []
    (ROOT / "target/bench").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "target/bench") as folder:
        folder = Path(folder)
        model, adapter, size = make(folder, args.layers)
        out = folder / "out"
        jobs = {
            ("quantize", "peer"): [python, "-c", QUANTIZE, model, "-", out],
            ("quantize", "kto"): [BIN / "kto-quantize", "-q", model, "-o", out],
            ("merge", "peer"): [python, "-c", MERGE, model, adapter, out],
            ("merge", "kto"): [BIN / "kto-merge", "-q", "--base", model, "--adapter", adapter, "-o", out],
        }
        for round_ in range(args.rounds):
            rate = copy_rate(model, folder / "copy")
            for (job, who), command in jobs.items():
                wall, cpu, peak, said = run(command)
                work = float(said.split()[-1]) if who == "peer" else wall
                rows.append({"round": round_, "job": job, "who": who, "wall_s": round(wall, 3), "work_s": round(work, 3), "cpu_s": round(cpu, 3),
                             "peak_mib": round(peak, 1), "copy_gb_s": round(rate, 3)})
                print(json.dumps(rows[-1]), flush=True)
                shutil.rmtree(out)
    result = {"machine": machine.describe(), "revision": machine.revision(), "model_bytes": size, "rank": RANK, "rows": rows, "summary": {}}
    for job in ("quantize", "merge"):
        median = lambda who, key: statistics.median(r[key] for r in rows if (r["job"], r["who"]) == (job, who))
        read_rate = size / median("kto", "wall_s") / 1e9
        result["summary"][job] = {
            "peer_work_s": median("peer", "work_s"), "kto_s": median("kto", "wall_s"), "speedup": median("peer", "work_s") / median("kto", "wall_s"),
            "peer_cpu_s": median("peer", "cpu_s"), "kto_cpu_s": median("kto", "cpu_s"),
            "peer_peak_mib": median("peer", "peak_mib"), "kto_peak_mib": median("kto", "peak_mib"),
            "memory_ratio": median("peer", "peak_mib") / median("kto", "peak_mib"),
            "source_gb_s": read_rate, "share_of_copy": read_rate / statistics.median(r["copy_gb_s"] for r in rows),
        }
    print(json.dumps(result["summary"], indent=1))
    if args.save:
        args.save.write_text(json.dumps(result, indent=1) + "\n")


main()
