#!/usr/bin/env python3
"""Checks adapters of kto-train against PEFT: trained by the tool, loaded with PEFT, and scored by both.

usage: adapter_peers.py [FAMILY...]      default: every family of testdata/families

Each family is trained for a few steps with matrices alone, and with modules and biases trained whole (--modules-to-save, --bias). PEFT must
load what is written without a missing or unexpected name, write the same tensors again, and give kto-eval's log-probabilities within f32's
rounding. Needs torch, transformers, peft, pyarrow (made with 2.15.0, 5.23.0, 0.21.2) and the tools in target/release.
"""
import hashlib
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pyarrow as pa
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "target" / "release"
KINDS = {
    "plain": [],
    "ends": ["--target-modules", "{o}", "--modules-to-save", "embed_tokens,lm_head"],
    "norms": ["--target-modules", "{o}", "--modules-to-save", "norm,down_proj"],
    "biases": ["--target-modules", "{q},{o}", "--bias", "lora-only"],
    "all-biases": ["--target-modules", "{q}", "--bias", "all", "--modules-to-save", "lm_head"],
}
failures = []


def check(ok, text):
    print(("ok    " if ok else "FAIL  ") + text, flush=True)
    if not ok:
        failures.append(text)


def write_tokens(path, rows):
    """A token file as kto-tokenize writes it."""
    digest = lambda ids: int.from_bytes(hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in ids)).digest()[:8], "little")
    lists = lambda k: pa.array([row[k] for row in rows], pa.list_(pa.field("item", pa.uint32(), nullable=False)))
    fields = [pa.field(n, t, nullable=False) for n, t in [
        ("prompt_ids", lists(0).type), ("completion_ids", lists(1).type), ("label", pa.bool_()), ("prompt_hash", pa.uint64())]]
    whole = hashlib.sha256()
    for prompt, completion, label in rows:
        for ids in (prompt, completion):
            whole.update(b"".join(i.to_bytes(4, "little") for i in [len(ids), *ids]))
        whole.update(bytes([label]))
    metadata = {"format_version": 1, "tokenizer": "", "template": "", "vocab_size": 48, "max_length": 64, "truncated": 0, "dropped": 0,
                "rows": len(rows), "fingerprint": whole.hexdigest()}
    metadata = {f"kto.{key}": str(value) for key, value in metadata.items()}
    schema = pa.schema(fields, metadata=metadata)
    columns = [lists(0), lists(1), pa.array([row[2] for row in rows]), pa.array([digest(row[0]) for row in rows], pa.uint64())]
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))


def logps(model, prompt, completion):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1]
    return logits.double().log_softmax(-1)[range(len(completion)), completion].sum().item()


def run(tool, *words):
    return subprocess.run([TOOLS / tool, "-q", *map(str, words)], check=True, capture_output=True, text=True).stdout


def compare(family, kind, flags, top):
    data, out = top / "rows.kto.arrow", top / kind
    generator = torch.Generator().manual_seed(7)
    draw = lambda n: torch.randint(3, 48, (n,), generator=generator).tolist()
    rows = [(draw(n), draw(m), i % 2 == 0) for i, (n, m) in enumerate([(7, 6), (4, 8), (8, 3), (5, 5)])]
    write_tokens(data, rows)
    run("kto-train", "--model", family, "--data", data, "--out", out, "--batch", 4, "--max-steps", 5, "--lr", 0.02, *flags)
    ours = [json.loads(line)["logps"] for line in run("kto-eval", "score", "--model", family, "--adapter", out, "--no-kl", data).splitlines()]
    model = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32, attn_implementation="eager").eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, out / "adapter")
    caught = [str(w.message)[:120] for w in caught if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    off = max(abs(a - logps(model, p, c)) / abs(a) for a, (p, c, _) in zip(ours, rows))
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again, save_embedding_layers=False)
        before, after = (load_file(f"{d}/adapter_model.safetensors") for d in (out / "adapter", again))
    same = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    whole = sum("lora_" not in k for k in before)
    check(off < 1e-5 and same and not caught, f"{family.name} {kind}: {len(before)} tensors, {whole} of them whole; log-probabilities off by {off:.1e}, "
          f"written again {'the same' if same else 'otherwise'}{'; ' + caught[0] if caught else ''}")


def main():
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    names = sys.argv[1:] or [d.name for d in sorted((ROOT / "testdata/families").iterdir()) if d.is_dir()]
    for name in names:
        family = ROOT / "testdata/families" / name
        fused = json.loads((family / "config.json").read_text())["model_type"] == "phi3"
        words = dict(q="qkv_proj" if fused else "q_proj", o="o_proj")
        with tempfile.TemporaryDirectory() as top:
            for kind, flags in KINDS.items():
                compare(family, kind, [flag.format(**words) for flag in flags], Path(top))
    sys.exit(1 if failures else 0)


main()
