#!/usr/bin/env python3
"""Holds GGUF files of every family against llama.cpp and transformers, in both directions.

usage: gguf_families.py [NAME...]      default: every folder of testdata/families that llama.cpp can compute

For each tiny model: kto-quantize writes it as F32, F16 and BF16; llama.cpp's logits of the F32 file and of the F16 file against transformers'
with the same weights; `--dequantize` of the BF16 file gives the model's tensors bit for bit, and transformers' logits with the directory it
makes are those with the model (to f32's rounding where a number went through f32). Then files that the gguf package wrote
(testdata/gguf, gguf_models.py): transformers' own loader (`gguf_file=`) against the directory that --dequantize makes, where that loader
reads the rotation; else against the model. Ends with 1 when something does not hold.

What llama.cpp computes in another way: windows of Mistral and Phi 3 (turned off here), heads of Gemma that are not scaled by their size (set
so here), yarn with its own slopes (left out here). Its GELU is a table of half-precision numbers, so Gemma's logits agree to 2e-3.
Needs transformers 5.23, torch, gguf 0.19.0, llama-cpp-python 0.3.36, safetensors, and kto-quantize in target/release.
"""
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
import llama_cpp
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "target" / "release" / "kto-quantize"
GOLDEN = ROOT / "testdata" / "families"
# transformers' loader takes no note of these keys.
NOT_READ = ("yarn", "linear", "longrope", "partial", "llama3", "gemma", "stablelm")
failures = []
quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))


def check(ok, text):
    print(("ok    " if ok else "FAIL  ") + text, flush=True)
    if not ok:
        failures.append(text)


def tool(*args):
    return subprocess.run([TOOL, "-q", *args], capture_output=True, text=True)


def by_llama_cpp(path, ids):
    """Logits of all positions, computed in f32."""
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        return None
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = settings.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    failed = llama_cpp.llama_decode(context, batch)
    shape = (len(ids), llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(shape[0] * shape[1],)).reshape(shape).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return None if failed else logits


def by_transformers(folder, ids, **more):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **more).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def changed(name, work):
    """The model, with what llama.cpp computes in another way turned off."""
    folder = work / "model"
    folder.mkdir()
    shutil.copy(GOLDEN / name / "model.safetensors", folder)
    config = json.loads((GOLDEN / name / "config.json").read_text())
    if "query_pre_attn_scalar" in config:
        config["query_pre_attn_scalar"] = config["head_dim"]
    elif config.get("sliding_window"):
        config["sliding_window"] = None
    for field in ("beta_fast", "beta_slow"):
        config["rope_parameters"].pop(field, None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder, config


def through(name, work):
    model, config = changed(name, work)
    golden = load_file(GOLDEN / name / "golden.safetensors")
    ids = {length: golden[f"ids.{length}"].flatten().tolist() for length in ("short", "long")}
    for kind in ("F32", "F16", "BF16"):
        made = tool(model, "--form", "gguf", "--type", kind, "-o", work / f"{kind}.gguf")
        if made.returncode:
            return check(False, f"{name} {kind}: {made.stderr.strip()}")
    tolerance = 2e-3 if name.startswith("gemma") else 2e-5
    # llama.cpp has at least 256 positions of context, and LongRoPE's choice goes by the context.
    lengths = ["long"] if config["rope_parameters"].get("rope_type") == "longrope" else ["short", "long"]
    for length in lengths:
        truth = by_transformers(model, ids[length])
        for kind, within in (("F32", tolerance), ("F16", 1e-2)):
            logits = by_llama_cpp(work / f"{kind}.gguf", ids[length])
            off = np.inf if logits is None else abs(logits - truth).max()
            check(off <= within * abs(truth).max(), f"{name} {length} {kind}: llama.cpp's logits within {off:.1e} of {abs(truth).max():.1f}")
    if lengths == ["long"]:
        # The other divisors: the original length beyond llama.cpp's context.
        config["original_max_position_embeddings"] = config["rope_parameters"]["original_max_position_embeddings"] = 512
        config["max_position_embeddings"] = 2048
        (model / "config.json").write_text(json.dumps(config))
        tool(model, "--form", "gguf", "--type", "F32", "-o", work / "short.gguf")
        truth, logits = by_transformers(model, ids["long"]), by_llama_cpp(work / "short.gguf", ids["long"])
        off = np.inf if logits is None else abs(logits - truth).max()
        check(off <= 2e-5 * abs(truth).max(), f"{name}, the short divisors: llama.cpp's logits within {off:.1e}")
        model, _ = changed(name, Path(tempfile.mkdtemp(dir=work)))
    made = tool(work / "BF16.gguf", "--dequantize", "-o", work / "back")
    if made.returncode:
        return check(False, f"{name}: {made.stderr.strip()}")
    given, found = load_file(model / "model.safetensors"), load_file(work / "back" / "model.safetensors")
    same = given.keys() == found.keys() and all(given[k].dtype == found[k].dtype and torch.equal(given[k], found[k]) for k in given)
    check(same, f"{name}: {len(given)} tensors come back bit for bit")
    off = max(abs(by_transformers(model, i) - by_transformers(work / "back", i)).max() for i in ids.values())
    check(off <= 1e-5, f"{name}: transformers' logits with what comes back within {off:.1e}")


def of_the_package(path, work):
    made = tool(path, "--dequantize", "-o", work / "back")
    if made.returncode:
        return check(False, f"{path.name}: {made.stderr.strip()}")
    golden = load_file(GOLDEN / path.stem / "golden.safetensors")
    for length in ("short", "long"):
        ids = golden[f"ids.{length}"].flatten().tolist()
        ours = by_transformers(work / "back", ids)
        if any(word in path.stem for word in NOT_READ):
            truth, what = by_transformers(changed(path.stem, Path(tempfile.mkdtemp(dir=work)))[0], ids), "the model"
        else:
            truth, what = by_transformers(path.parent, ids, gguf_file=path.name), "its own GGUF loader"
        off = abs(ours - truth).max()
        check(off <= 1e-5 * max(1, abs(truth).max()), f"{path.name} {length}: transformers' logits within {off:.1e} of those by {what}")


names = sys.argv[1:] or sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and p.name != "llama-dynamic")
for name in names:
    with tempfile.TemporaryDirectory() as work:
        through(name, Path(work))
for path in sorted((ROOT / "testdata" / "gguf").glob("*.gguf")):
    if not sys.argv[1:] or path.stem in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as work:
            of_the_package(path, Path(work))
sys.exit(bool(failures))
