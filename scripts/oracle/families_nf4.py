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
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def decoded(model):
    """The same model with plain linear layers in f32: transformers would compute in bf16."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            linear.weight.data = weight
            if module.bias is not None:
                linear.bias.data = module.bias.data.float()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
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
            logits = decoded(model).eval()(input_ids=ids[None], use_cache=False).logits[0]
        save_file({"logits.long": logits.contiguous()}, folder / "golden.safetensors")
        print(name, logits.dtype, float(logits.abs().max()))


if __name__ == "__main__":
    main()
