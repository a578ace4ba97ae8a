#!/usr/bin/env python3
"""Writes the tiny models of testdata/families as GGUF files with the gguf package, by the rules of llama.cpp's converter.

    pip install gguf==0.19.0 safetensors torch
    scripts/oracle/gguf_models.py testdata/families testdata/gguf [NAME...]

Nothing of these tools is in them: names of tensors are the package's own table, keys and values what convert_hf_to_gguf.py writes for the
family. NAME.gguf holds matrices in BF16, vectors in F32. Gemma's head scale is the one that llama.cpp has (query_pre_attn_scalar is the head
size), which no weight depends on. A tokenizer is not in them.
"""
import json
import math
import sys
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma2": "gemma2",
                 "gemma3_text": "gemma3", "stablelm": "stablelm"}
DEFAULT = ["llama3", "llama-linear", "llama-biases", "qwen2", "qwen2-yarn", "qwen3", "phi3-longrope", "phi3-partial", "gemma2", "gemma3", "stablelm"]


def permuted(weight, heads):
    """The two halves of each head take turns."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def divisors(rope, dim):
    """Llama 3's, as the converter computes them."""
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < old / high:
            yield 1.0
        elif wavelength > old / low:
            yield rope["factor"]
        else:
            smooth = (old / wavelength - low) / (high - low)
            yield 1 / ((1 - smooth) / rope["factor"] + smooth)


def settings(writer, config, heads, dim, rope):
    kind = config["model_type"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    # The converter leaves it to the list of tokens, which is not in these files.
    writer.add_vocab_size(config["vocab_size"])
    if kind == "stablelm":
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_parallel_residual(config["use_parallel_residual"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if kind not in ("stablelm", "gemma2"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("llama", "mistral"):
        writer.add_rope_dimension_count(dim)
    if kind in ("phi3", "stablelm"):
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * dim))
    if kind in ("qwen3", "gemma2", "gemma3_text"):
        writer.add_key_length(dim)
        writer.add_value_length(dim)
    if kind == "phi3":
        writer.add_sliding_window(config["sliding_window"] or 0)
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if kind.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
    if kind == "gemma3_text":
        writer.add_sliding_window_pattern(2)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])


def convert(folder, path):
    config = json.loads((folder / "config.json").read_text())
    kind, heads = config["model_type"], config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    architecture = ARCHITECTURES[kind]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    settings(writer, config, heads, dim, rope)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    for name, weight in load_file(folder / "model.safetensors").items():
        weight = weight.float()
        if architecture == "llama" and "q_proj" in name:
            weight = permuted(weight, heads)
        if architecture == "llama" and "k_proj" in name:
            weight = permuted(weight, config["num_key_value_heads"])
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if weight.dim() > 1:
            bits = weight.bfloat16().view(torch.int16).numpy()
            writer.add_tensor(to, bits.view("uint8").reshape(weight.shape[0], -1), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(to, weight.numpy())
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", torch.tensor(list(divisors(rope, dim))).numpy())
    if rope["rope_type"] == "longrope":
        scale = config["max_position_embeddings"] / config["original_max_position_embeddings"]
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(config["original_max_position_embeddings"])))
        writer.add_tensor("rope_factors_long.weight", torch.tensor(rope["long_factor"]).numpy())
        writer.add_tensor("rope_factors_short.weight", torch.tensor(rope["short_factor"]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


families, out = Path(sys.argv[1]), Path(sys.argv[2])
for name in sys.argv[3:] or DEFAULT:
    convert(families / name, out / f"{name}.gguf")
