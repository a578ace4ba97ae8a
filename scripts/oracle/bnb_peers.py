#!/usr/bin/env python3
"""Checks directories of kto-quantize against transformers + bitsandbytes: they load, and tensors and logits are equal.

usage: bnb_peers.py [MODEL_DIR...]        default: the demo model, and a random one of 8 wider blocks

For nf4 and fp4, with and without double quantization, and for int8: transformers loads the directory, and quantizes MODEL_DIR with
bitsandbytes on the fly. Codes, scales, decoded values and logits of the two must be equal bit for bit. Two things of double quantization
are given: the offset (the mean of the scales, which torch sums in an order of its own), and the 8-bit codes of scales where the look-up
table of bitsandbytes' CPU back end misses the nearest one: there ours must be nearer. kto-quantize --dequantize must give
what bitsandbytes decodes. Rows and columns must be multiples of 64: with others bitsandbytes' own forward pass on the CPU fails.
Ends with 1 when something does not hold.
Needs torch, transformers, bitsandbytes (made with 2.15, 5.23, 0.50.2) and the tools in target/release.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, quantize_blockwise
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from wide import wide_model

ROOT = Path(__file__).resolve().parents[2]
QUANTIZE = ROOT / "target" / "release" / "kto-quantize"
failures = []


def check(ok, text):
    print(("ok    " if ok else "FAIL  ") + text, flush=True)
    if not ok:
        failures.append(text)


def quantize(*words):
    subprocess.run([QUANTIZE, "-q", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def logits(model):
    ids = torch.arange(40).reshape(1, 40) * 5 % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits.float()


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt))}


def decoded(layer):
    weight = layer.weight
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    scales = layer.state.SCB if layer.state.SCB is not None else weight.SCB
    return int8_vectorwise_dequant(weight.data, scales)


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def same_codes(ours, theirs):
    """Whether codes and scales of two layers are equal, double quantization aside."""
    if not equal(ours.weight.data, theirs.weight.data):
        return False
    if isinstance(ours, Linear8bitLt):
        scales = [m.state.SCB if m.state.SCB is not None else m.weight.SCB for m in (ours, theirs)]
        return equal(*scales)
    a, b = ours.weight.quant_state, theirs.weight.quant_state
    return equal(a.code, b.code) and a.blocksize == b.blocksize and a.dtype == b.dtype and (a.nested or equal(a.absmax, b.absmax))


def same_nested(ours, theirs, source):
    """Compares the 8-bit scales of two layers and gives theirs our offset and codes; returns how far the offsets were apart, how many codes
    differed, and whether everything is as it must be."""
    a, b = ours.weight.quant_state, theirs.weight.quant_state
    apart = abs(float(b.offset - a.offset)) / abs(float(a.offset))
    single = source.float().reshape(-1, a.blocksize).abs().amax(1)
    b.offset = a.offset
    b.absmax, b.state2 = quantize_blockwise(single - a.offset, code=b.state2.code, blocksize=b.state2.blocksize)
    good = equal(a.state2.absmax, b.state2.absmax) and equal(a.state2.code, b.state2.code)
    different = (a.absmax != b.absmax).nonzero().flatten()
    scales = (single - a.offset).double()
    for i in different.tolist():
        unit = a.state2.absmax[i // a.state2.blocksize].double()
        error = [abs(scales[i] - s.state2.code[int(s.absmax[i])].double() * unit) for s in (a, b)]
        # Up to the rounding of the quotient to f32.
        good &= bool(error[0] <= error[1] + 1e-7 * unit)
    b.absmax = a.absmax
    return apart, len(different), good


def compare(name, source, out, flags, config):
    quantize(source, "-o", out, *flags)
    mine = AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(source, device_map="cpu", dtype=mine.dtype, quantization_config=config(mine))
    a, b = layers(mine), layers(theirs)
    check(sorted(a) == sorted(b) and len(a) > 0, f"{name}: {len(a)} layers quantized, the same ones")
    check(all(same_codes(a[k], b[k]) for k in b), f"{name}: codes and scales of all layers equal bit for bit")
    if any(isinstance(m, Linear4bit) and m.weight.quant_state.nested for m in b.values()):
        weights = load_file(source / "model.safetensors")
        found = [same_nested(a[k], b[k], weights[f"{k}.weight"]) for k in b]
        total = sum(a[k].weight.quant_state.absmax.numel() for k in b)
        check(all(good for _, _, good in found), f"{name}: scales of scales equal, offsets apart by {max(x for x, _, _ in found):.1e}, "
              f"{sum(n for _, n, _ in found)} of {total} codes nearer than bitsandbytes' table")
    values = {k: decoded(layer) for k, layer in b.items()}
    check(all(equal(decoded(a[k]), values[k]) for k in b), f"{name}: decoded values equal bit for bit")
    off = float((logits(mine) - logits(theirs)).abs().max())
    check(off == 0.0, f"{name}: {type(next(iter(a.values()))).__name__}, logits off by {off}, largest {float(logits(theirs).abs().max()):.3g}")
    floats = out.with_name(out.name + " floats")
    quantize(out, "--dequantize", "-o", floats)
    back = load_file(floats / "model.safetensors")
    worst = max(float((back[f"{k}.weight"].float() - v.float()).abs().max() / v.abs().max()) for k, v in values.items())
    # 8-bit values are rounded to the dtype of the model.
    check(worst <= (0 if isinstance(next(iter(a.values())), Linear4bit) else 2**-8), f"{name}: --dequantize off by {worst:.2g} of the largest")


def model(folder):
    folder = Path(folder).resolve()
    short = f"{folder.parent.name}/{folder.name}"
    with tempfile.TemporaryDirectory() as work:
        for kind in ("nf4", "fp4"):
            for double in (True, False):
                flags = ["--form", kind, *([] if double else ["--no-double-quant"])]
                four = lambda mine: BitsAndBytesConfig(  # noqa: E731
                    load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=mine.dtype)
                name = f"{kind}{' double' if double else ''}"
                compare(f"{short} {name}", folder, Path(work) / name, flags, four)
        eight = lambda mine: BitsAndBytesConfig(load_in_8bit=True)  # noqa: E731
        compare(f"{short} int8", folder, Path(work) / "int8", ["--form", "int8"], eight)


if len(sys.argv) > 1:
    for argument in sys.argv[1:]:
        model(argument)
else:
    model(ROOT / "testdata/demo/model")
    with tempfile.TemporaryDirectory() as top:
        model(wide_model(Path(top) / "wide"))
sys.exit(bool(failures))
