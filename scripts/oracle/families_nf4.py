#!/usr/bin/env python3
"""Quantizes models of testdata/families by transformers and bitsandbytes, and computes logits with what they decode to.

    pip install transformers==5.23.0 bitsandbytes==0.50.2 torch
    scripts/oracle/families_nf4.py testdata/families testdata/families-nf4 [NAME...]

NAME/ gets config.json and model.safetensors as transformers saves them (NF4, double quantization, bf16), and golden.safetensors:
logits.long of the ids.long of the model's own golden file, in f32 with the decoded weights.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def decoded(folder, plain):
    """A model with the weights that bitsandbytes decodes from a saved file: what it holds in memory has another layout on a CPU."""
    stored = load_file(folder / "model.safetensors")
    states = {}
    for name in stored:
        weight = name.split(".weight.")[0] + ".weight"
        if name != weight:
            states.setdefault(weight, {})[name.removeprefix(weight + ".")] = stored[name]
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        value = stored.get(name)
        if name in states:
            state = QuantState.from_dict(states[name], device=torch.device("cpu"))
            # Blocks run over the flat matrix. bitsandbytes' CPU code decodes rows shorter than a block wrongly, so it gets longer ones.
            shape, state.shape = state.shape, torch.Size([parameter.numel() // state.blocksize, state.blocksize])
            value = dequantize_4bit(value, state).reshape(shape)
            # NF4 is that near: half a step at most.
            assert (value.float() - parameter.data).abs().max() < 0.16 * parameter.data.abs().max(), name
        if value is not None:
            parameter.data = value.float()
    return model


def main():
    torch.set_num_threads(1)
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name in sys.argv[3:] or ["phi3-longrope", "stablelm"]:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        load = dict(device_map="cpu", dtype=torch.bfloat16, attn_implementation="eager")
        model = AutoModelForCausalLM.from_pretrained(source / name, quantization_config=settings, **load)
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            for file in ("config.json", "model.safetensors"):
                shutil.copyfile(Path(saved) / file, folder / file)
        ids = load_file(source / name / "golden.safetensors")["ids.long"].long()
        with torch.no_grad():
            logits = decoded(folder, source / name).eval()(input_ids=ids[None], use_cache=False).logits[0]
        save_file({"logits.long": logits.contiguous()}, folder / "golden.safetensors")
        print(name, logits.dtype, float(logits.abs().max()))


if __name__ == "__main__":
    main()
