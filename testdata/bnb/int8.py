#!/usr/bin/env python3
"""Quantizes the tiny model to 8 bits on the CPU and keeps what bitsandbytes decodes one of its weights to.
usage: int8.py tiny_llama_bf16 tiny_llama_int8 int8.safetensors
"""
import sys
import bitsandbytes
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

source, out, golden = sys.argv[1:4]
config = BitsAndBytesConfig(load_in_8bit=True)
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu", dtype=torch.bfloat16)
model.save_pretrained(out)
tensors = load_file(f"{out}/model.safetensors")
name = "model.layers.1.mlp.down_proj"
codes, scales = tensors[f"{name}.weight"], tensors[f"{name}.SCB"]
values = bitsandbytes.functional.int8_vectorwise_dequant(codes, scales)
kept = {"codes": codes.view(torch.uint8), "scales": scales, "values": values}
save_file(kept, golden, metadata={"bitsandbytes": bitsandbytes.__version__, "weight": name})
