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
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from wide import wide_model

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "target" / "release" / "kto-quantize"
GOLDEN = ROOT / "testdata" / "families"
# transformers' loader takes no note of these keys.
NOT_READ = ("yarn", "linear", "longrope", "partial", "llama3", "gemma", "stablelm", "biases", "qwen3")
# Texts that llama.cpp encodes in another way than the tokenizers that its files are made of, which are what comes back: it knows Phi 3's blanks
# behind control tokens by the name of the model, and does not compose letters and their marks as Qwen does.
KNOWN = {
    "phi-3-mini": {"<s>x</s> [INST] y [/INST]", "<|user|>\n hi<|end|>\n a <|assistant|>  b"},
    "qwen2.5": {"\U0001f917\U0001f917\U0001f3fd\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \u00e9 \ufb01 \u00bd \u2163"},
}
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


def blocks(work):
    """Quantized files of a wider model: transformers' loader, with the gguf package's decoder, against --dequantize, bit for bit."""
    model = wide_model(work / "wide")
    for kind in ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "Q4_0", "F16"):
        file, back = work / f"{kind}.gguf", work / f"{kind}-back"
        made = [tool(model, "--form", "gguf", "--type", kind, "-o", file), tool(file, "--dequantize", "--dtype", "f32", "-o", back)]
        if any(m.returncode for m in made):
            check(False, f"wide {kind}: {made[0].stderr} {made[1].stderr}")
            continue
        theirs = AutoModelForCausalLM.from_pretrained(work, gguf_file=file.name, dtype=torch.float32).state_dict()
        ours = load_file(back / "model.safetensors")
        differing = [name for name, values in ours.items() if not torch.equal(values, theirs[name])]
        check(not differing, f"wide {kind}: {len(ours)} tensors are those of transformers' loader bit for bit {differing[:3]}")


def tokenizers(folder, work):
    """The tokenizer that --dequantize makes of a file without our own details, against llama.cpp's with that file."""
    model = work / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, model)
    document = json.loads((folder / "tokenizer.json").read_text())
    rows = max([*document["model"]["vocab"].values(), *(t["id"] for t in document["added_tokens"])]) + 1
    phi = "phi" in folder.name
    config = dict(model_type="phi3" if phi else "llama", vocab_size=rows, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                  num_attention_heads=1, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True,
                  bos_token_id=1, eos_token_id=2)
    (model / "config.json").write_text(json.dumps(config))
    linears = {"self_attn.qkv_proj": 12, "self_attn.o_proj": 4, "mlp.gate_up_proj": 8, "mlp.down_proj": 4} if phi else dict.fromkeys(
        [f"self_attn.{m}_proj" for m in "qkvo"] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")], 4)
    shapes = {f"model.layers.0.{m}.weight": (n, 4) for m, n in linears.items()}
    shapes |= {f"model.layers.0.{m}.weight": (4,) for m in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.embed_tokens.weight": (rows, 4), "model.norm.weight": (4,)}
    save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, model / "model.safetensors")
    file, back = work / "m.gguf", work / "back"
    made = tool(model, "--form", "gguf", "--type", "BF16", "-o", file)
    file.write_bytes(file.read_bytes().replace(b"kto.tokenizer", b"abc.tokenizer", 1))
    made = made if made.returncode else tool(file, "--dequantize", "-o", back)
    if made.returncode:
        return check(False, f"{folder.name}: {made.stderr.strip()}")
    ours = Tokenizer.from_file(str(back / "tokenizer.json"))
    llama = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    rows = [json.loads(line) for line in (ROOT / "testdata/tokenize/encodings.jsonl").read_text().splitlines()]
    texts = sorted({row["text"] for row in rows})
    differing = [t for t in texts if ours.encode(t).ids != llama.tokenize(t.encode(), add_bos=True, special=True)]
    known = KNOWN.get(folder.name, set())
    check(set(differing) <= known, f"{folder.name}: {len(texts) - len(differing)} of {len(texts)} texts have llama.cpp's ids; "
          f"others {sorted(set(differing) - known)}")


# llama.cpp has no dynamic rope; of a Gemma that takes images transformers would load the whole.
LEFT_OUT = ("llama-dynamic", "gemma3-images")
names = sys.argv[1:] or sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and p.name not in LEFT_OUT)
for name in names:
    with tempfile.TemporaryDirectory() as work:
        through(name, Path(work))
for path in sorted((ROOT / "testdata" / "gguf").glob("*.gguf")):
    if not sys.argv[1:] or path.stem in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as work:
            of_the_package(path, Path(work))
if not sys.argv[1:]:
    with tempfile.TemporaryDirectory() as work:
        blocks(Path(work))
    for name in ("stories260k", "demo/model", *(f"tokenize/{n}" for n in ("gpt2", "minimind", "mistral-v3", "phi-3-mini", "qwen2.5"))):
        with tempfile.TemporaryDirectory() as work:
            tokenizers(ROOT / "testdata" / name, Path(work))
sys.exit(bool(failures))
