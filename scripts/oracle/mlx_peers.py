#!/usr/bin/env python3
"""Checks kto-quantize and kto-merge against mlx-lm: directories load, logits and bytes are equal.

usage: mlx_peers.py [MODEL_DIR]           default: testdata/demo/model

For every number of bits and group size, and two recipes: mlx_lm's own quantization of the model against the directory of kto-quantize, every
tensor bit for bit, and the logits. The float modes, which are only read: what kto-quantize --dequantize makes of them against mx.dequantize. Then an adapter (plain, DoRA): mlx-lm's fuse against kto-merge; a merge with zero delta into a
quantized base must keep every byte. Needs mlx (CPU), mlx-lm (made with 0.32.4, 0.32.2).
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

mx.set_default_device(mx.cpu)
ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "target" / "release"
failures = []


def check(ok, text):
    print(("ok    " if ok else "FAIL  ") + text)
    if not ok:
        failures.append(text)


def run(tool, *words):
    subprocess.run([BIN / tool, "-q", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def logits(model):
    ids = mx.arange(24).reshape(1, 24) * 5 % 384
    return np.array(model(ids).astype(mx.float32))


def raw(array):
    array = mx.contiguous(array)
    return np.array(mx.view(array, mx.uint16) if array.dtype in (mx.bfloat16, mx.float16) else array)


def same(ours, theirs, name):
    a, b = dict(tree_flatten(ours.parameters())), dict(tree_flatten(theirs.parameters()))
    differing = [key for key in b if key not in a or raw(a[key]).tobytes() != raw(b[key]).tobytes()]
    off = float(abs(logits(ours) - logits(theirs)).max())
    check(not differing and sorted(a) == sorted(b) and off == 0.0, f"{name}: {len(b)} tensors equal bit for bit, logits off by {off} {differing[:3]}")


source = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "testdata/demo/model")
with tempfile.TemporaryDirectory() as work:
    work = Path(work)
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            out = work / f"{bits} {group}"
            run("kto-quantize", source, "--form", "mlx", "--bits", bits, "--group-size", group, "-o", out)
            theirs, config = load_model(source)
            theirs, _ = quantize_model(theirs, config, group, bits)
            same(load_model(out)[0], theirs, f"{bits} bits in groups of {group}")
    for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
        out = work / recipe
        run("kto-quantize", source, "--form", "mlx", "--recipe", recipe, "-o", out)
        theirs, config = load_model(source)
        theirs, _ = quantize_model(theirs, config, 64, 4, quant_predicate=mixed_quant_predicate_builder(recipe, theirs, 64))
        same(load_model(out)[0], theirs, recipe)
    for mode, bits, group in (("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)):
        model, config = load_model(source)
        model, config = quantize_model(model, config, group, bits, mode=mode)
        theirs = work / mode
        save_model(theirs, model)
        save_config(config, theirs / "config.json")
        run("kto-quantize", theirs, "--dequantize", "--dtype", "f32", "-o", work / f"{mode} floats")
        stored = dict(tree_flatten(model.parameters()))
        ours = mx.load(str(work / f"{mode} floats" / "model.safetensors"))
        packed = [key[: -len(".scales")] for key in stored if key.endswith(".scales")]
        decode = lambda x: mx.dequantize(stored[x + ".weight"], stored[x + ".scales"], group_size=group, bits=bits, mode=mode)
        differing = [x for x in packed if not mx.array_equal(decode(x).astype(mx.float32), ours[x + ".weight"])]
        check(packed and not differing, f"{mode}: {len(packed)} matrices decoded as mlx does {differing[:3]}")
    for kind, base in [("lora", source), ("dora", source), ("lora", work / "4 64")]:
        model, _ = load_model(base)
        model.freeze()
        keys = ["self_attn.q_proj", "mlp.down_proj"]
        linear_to_lora_layers(model, len(model.layers), {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": keys}, use_dora=kind == "dora")
        mx.random.seed(3)
        for key, value in tree_flatten(model.trainable_parameters()):
            if key.endswith("lora_b"):
                model.load_weights([(key, mx.random.normal(value.shape) * 0.05)], strict=False)
        adapter = work / f"adapter {kind} {base.name}"
        adapter.mkdir(exist_ok=True)
        mx.save_safetensors(str(adapter / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
        settings = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": keys}}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        out = work / f"merged {kind} {base.name}"
        run("kto-merge", "--base", base, "--adapter", adapter, "--dtype", "f32", "-o", out)
        with_adapter, ours = logits(model), logits(load_model(out)[0])
        off = abs(ours - with_adapter).max() / abs(with_adapter).max()
        # mlx-lm computes in the base's bf16 and multiplies quantized weights in another order: its own distance from f32 weights is the measure.
        dense = work / f"dense {kind} {base.name}"
        command = ["--adapter", adapter, "--scale", 0, "--dtype", "f32"]
        run("kto-merge", "--base", base, *command, "-o", dense)
        plain, exact = logits(load_model(base)[0]), logits(load_model(dense)[0])
        own = abs(plain - exact).max() / abs(exact).max()
        check(off < 2 * own + 1e-3, f"{kind} on {base.name}: logits off by {off:.2g} from mlx-lm with the adapter, which without it is off by {own:.2g}")
    # A delta of zero changes no byte of a quantized base.
    weights = mx.load(str(adapter / "adapters.safetensors"))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {k: v * 0 if k.endswith("lora_b") else v for k, v in weights.items()})
    run("kto-merge", "--base", work / "4 64", "--adapter", adapter, "--form", "mlx", "-o", work / "zero")
    same(load_model(work / "zero")[0], load_model(work / "4 64")[0], "zero delta, quantized again")
sys.exit(bool(failures))
