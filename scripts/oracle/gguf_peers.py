#!/usr/bin/env python3
"""Checks GGUF files of kto-quantize against llama.cpp and the gguf package.

usage: gguf_peers.py [MODEL_DIR...]      default: testdata/demo/model testdata/stories260k and a random one of 8 wider blocks

For each model: makes a file of every type; reads it back with `gguf`, whose own decoder must give what ggml's gives; quantizes the same
values with ggml's quantizers (ctypes) and counts the bytes that differ; runs llama.cpp with the F16 file and compares ids of prompts and
greedy text with kto-eval's. A ggml whose compiler fused multiply-adds picks other codes here and there in the K forms: there the squared
error may be at most 0.1 % larger than ggml's. Ends with 1 when something does not hold.
Needs gguf, llama-cpp-python, tokenizers, safetensors (made with 0.19.0, 0.3.36), and the tools in target/release.
"""
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGUFReader, GGMLQuantizationType as T
from gguf.quants import dequantize
from tokenizers import Tokenizer

from wide import wide_model

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "target" / "release"
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"]
PROMPTS = ["Once upon a time", "Hello there, my 12 friends!\nIt's", " two  spaces and ünïcode"]
failures = []


def check(ok, text):
    print(("ok    " if ok else "FAIL  ") + text)
    if not ok:
        failures.append(text)


def ggml():
    folder = Path(llama_cpp.__file__).parent / "lib"
    name = next(p for p in folder.iterdir() if p.name.startswith("libggml-base") and ".so" in p.name)
    library = ctypes.CDLL(str(name))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantized_by_ggml(library, kind, values):
    rows, columns = values.shape
    out = np.zeros(values.size * 2 + 1024, dtype=np.uint8)
    pointer = lambda a: a.ctypes.data_as(ctypes.c_void_p)
    size = library.ggml_quantize_chunk(
        ctypes.c_int(kind), pointer(values), pointer(out), ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(columns), None)
    return out[:size]


def weights(library, files, name):
    source = {t.name: np.array(t.data, dtype=np.float32) for t in GGUFReader(files["F32"]).tensors}
    for kind, path in files.items():
        differing = total = 0
        worst = 0.0
        for tensor in GGUFReader(path).tensors:
            given = source[tensor.name].reshape(-1, tensor.shape[0])
            ours = dequantize(np.array(tensor.data), tensor.tensor_type).reshape(given.shape)
            if tensor.tensor_type in (T.F32, T.F16, T.BF16):
                width = {T.F32: 0.0, T.F16: 2**-11, T.BF16: 2**-8}[tensor.tensor_type]
                within = abs(ours - given) <= width * abs(given) + 1e-7 * (width > 0)
                if not within.all():
                    check(False, f"{name} {kind} {tensor.name}: more than the rounding of its type")
                continue
            bytes_ = np.array(tensor.data).reshape(-1).view(np.uint8)
            theirs = quantized_by_ggml(library, int(tensor.tensor_type), np.ascontiguousarray(given))
            differing += int((bytes_ != theirs).sum())
            total += theirs.size
            decoded = dequantize(theirs.reshape(np.array(tensor.data).shape), tensor.tensor_type).reshape(given.shape)
            error, theirs_error = ((ours - given) ** 2).sum(), ((decoded - given) ** 2).sum()
            worst = max(worst, float(error / max(theirs_error, 1e-30)))
        if total:
            share = 100 * differing / total
            exact = kind in ("Q8_0", "Q4_0") and differing == 0
            check(exact or worst <= 1.001, f"{name} {kind}: {differing} of {total} bytes differ from ggml's ({share:.3f} %), "
                  f"squared error at most {worst:.6f} of ggml's")


def text(files, model, name):
    llama = llama_cpp.Llama(str(files["F16"]), n_ctx=256, verbose=False, seed=0, n_threads=2)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    records = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    out = subprocess.run([BIN / "kto-eval", "generate", "-q", "--model", model, "--max-new-tokens", "40", "-"],
                         input=records, text=True, capture_output=True)
    check(out.returncode == 0, f"{name}: kto-eval generate {out.stderr.strip()}")
    ours = [json.loads(line) for line in out.stdout.splitlines()]
    for prompt, row in zip(PROMPTS, ours):
        ids = tokenizer.encode(prompt).ids
        check(llama.tokenize(prompt.encode(), add_bos=True, special=True) == ids, f"{name}: ids of {prompt!r}")
        answer = llama.create_completion(prompt, max_tokens=40, temperature=0, repeat_penalty=1.0)["choices"][0]["text"]
        mine = row.get("completion")
        mine = mine if isinstance(mine, str) else mine[0]["content"]
        # What is no UTF-8 one of them leaves out and the other replaces.
        mine = mine.replace("\ufffd", "")
        check(answer.strip() == mine.strip(), f"{name}: greedy text after {prompt!r}: {answer[:50]!r} / {mine[:50]!r}")


library = ggml()
with tempfile.TemporaryDirectory() as top:
    for folder in sys.argv[1:] or [ROOT / "testdata/demo/model", ROOT / "testdata/stories260k", wide_model(Path(top) / "wide")]:
        model = Path(folder).resolve()
        with tempfile.TemporaryDirectory() as work:
            files = {}
            for kind in TYPES:
                files[kind] = Path(work) / f"{kind}.gguf"
                command = [BIN / "kto-quantize", model, "-q", "--form", "gguf", "--type", kind, "-o", files[kind]]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            name = f"{model.parent.name}/{model.name}"
            weights(library, files, name)
            text(files, model, name)
sys.exit(bool(failures))
