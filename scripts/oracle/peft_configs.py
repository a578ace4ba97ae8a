#!/usr/bin/env python3
"""Which modules PEFT adapts, with which rank and scale, for many forms of adapter_config.json.

    pip install peft==0.21.2 transformers==5.23.0
    scripts/oracle/peft_configs.py > testdata/peft/configs.jsonl

One JSON object a line: name, config (adapter_config.json as PEFT saves it), linear (the base's linear layers), adapted
(module: rank, scale), saved (tensors of adapter_model.safetensors: shape).
"""

import json
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

CASES = {
    "list": dict(target_modules=["q_proj", "v_proj"]),
    "paths": dict(target_modules=["model.layers.1.self_attn.o_proj", "layers.2.mlp.up_proj"]),
    "regex": dict(target_modules=r".*layers\.[02]\.(self_attn|mlp)\.(q|gate)_proj"),
    "regex_lookahead": dict(target_modules=r"^(?!.*(lm_head|layers\.1)).*_proj$"),
    "all_linear": dict(target_modules="all-linear"),
    "excluded": dict(target_modules=["q_proj", "k_proj"], exclude_modules=["layers.1.self_attn.q_proj"]),
    "excluded_regex": dict(target_modules=["q_proj", "k_proj"], exclude_modules=r".*\.2\..*k_proj"),
    "layers": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]),
    "one_layer": dict(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"),
    "ranks": dict(
        target_modules=["q_proj", "v_proj", "o_proj"],
        rank_pattern={"v_proj": 2, r"^model\.layers\.0\.self_attn\.q_proj": 8},
        alpha_pattern={"v_proj": 3, "layers.1.self_attn.o_proj": 32},
    ),
    "rank_regex": dict(target_modules="all-linear", rank_pattern={r"layers\.\d\.mlp\..*": 1, r"(q|k)_proj": 5}),
    "rslora": dict(target_modules=["q_proj"], use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 9}),
    "dora": dict(target_modules=["q_proj", "down_proj"], use_dora=True),
    "saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved_norm": dict(target_modules=["q_proj"], modules_to_save=["input_layernorm", "embed_tokens"]),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "bias_all": dict(target_modules=["q_proj"], bias="all"),
    "bias_lora_only": dict(target_modules=["q_proj", "o_proj"], bias="lora_only"),
    "lora_bias": dict(target_modules=["o_proj"], lora_bias=True),
    "gaussian": dict(target_modules=["q_proj"], init_lora_weights="gaussian"),
    "orthogonal": dict(target_modules=["q_proj"], init_lora_weights="orthogonal"),
    "pissa": dict(target_modules=["q_proj"], init_lora_weights="pissa"),
    "olora": dict(target_modules=["q_proj"], init_lora_weights="olora"),
}


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True, tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def main():
    for name, fields in CASES.items():
        base = model()
        linear = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
        config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields)
        peft = get_peft_model(base, config)
        adapted = {}
        for path, module in peft.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                key = path.removeprefix("base_model.model.")
                adapted[key] = [module.r["default"], module.scaling["default"]]
        with tempfile.TemporaryDirectory() as folder:
            peft.save_pretrained(folder, save_embedding_layers=False)
            saved_config = json.loads((Path(folder) / "adapter_config.json").read_text())
            with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
                saved = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}
        for key in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(saved_config.get(key), list):
                saved_config[key].sort()
        row = dict(name=name, config=saved_config, linear=linear, adapted=adapted, saved=saved)
        print(json.dumps(row, sort_keys=True))


if __name__ == "__main__":
    main()
