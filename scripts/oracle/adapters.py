#!/usr/bin/env python3
"""Makes adapters of every kind with PEFT, on the tiny models of testdata/families, and what one KTO step with each computes.

    pip install transformers==5.23.0 peft==0.21.2 torch
    scripts/oracle/adapters.py testdata/families testdata/adapters [NAME...]

NAME/ gets adapter_config.json and adapter_model.safetensors as PEFT saves them, and golden.safetensors (f32 on the CPU, eager attention, one
sequence at a time): 0.prompt, 0.completion, 0.kl and so on, logps, reference_logps, kl, loss as families.py has them, and the
gradients of the loss (grad/MODULE.lora_A.weight, .lora_B.weight, .lora_magnitude_vector, and of what is trained whole by its own name).
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from families import BASE, FUSED, SEPARATE, step
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

# The tiny model, and the settings.
CASES = {
    "dora": ("qwen2", dict(target_modules=SEPARATE, use_dora=True)),
    "dora-biases": ("llama-biases", dict(target_modules=SEPARATE, use_dora=True, use_rslora=True)),
    "dora-norms": ("gemma3", dict(target_modules=["q_proj", "k_proj", "o_proj", "down_proj"], use_dora=True)),
    "dora-fused": ("phi3", dict(target_modules=FUSED, use_dora=True)),
    "dora-layers": ("llama-linear", dict(
        target_modules=["q_proj", "down_proj"], use_dora=True, layers_to_transform=[1], rank_pattern={"down_proj": 4})),
    "bias-adapted": ("llama-biases", dict(target_modules=["q_proj", "o_proj", "down_proj"], bias="lora_only", use_dora=True)),
    "bias-all": ("stablelm", dict(target_modules=["q_proj", "v_proj"], bias="all", layers_to_transform=[1])),
    "patterns": ("qwen3", dict(
        target_modules=SEPARATE, rank_pattern={"down_proj": 5, r"layers\.1\.self_attn\.(q|v)_proj": 1},
        alpha_pattern={"up_proj": 7, r"^model\.layers\.0\.mlp\.down_proj": 2})),
    "regex": ("mistral-window", dict(target_modules=r".*layers\.1\.(self_attn\.(q|o)|mlp\.gate)_proj", use_rslora=True)),
    # Above a trained embedding everything needs a gradient.
    "whole-block": ("qwen3", dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0], modules_to_save=["layers.1"])),
    "whole-embedding": ("qwen2", dict(target_modules=["v_proj"], layers_to_transform=[1], modules_to_save=["embed_tokens"])),
    "whole-ends": ("llama-biases", dict(target_modules=["q_proj", "down_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "whole-fused": ("phi3", dict(target_modules=["o_proj", "gate_up_proj"], modules_to_save=["qkv_proj", "lm_head"])),
    "whole-head": ("qwen2", dict(target_modules=["v_proj"], layers_to_transform=[1], modules_to_save=["lm_head"])),
    "whole-layers": ("stablelm", dict(target_modules=["q_proj", "up_proj"], modules_to_save=["norm", "down_proj", "k_proj"])),
    "whole-mlp": ("llama-biases", dict(target_modules=["q_proj", "o_proj"], modules_to_save=["mlp"])),
    "whole-norms": ("gemma3", dict(target_modules=["v_proj", "gate_proj"], layers_to_transform=[2], modules_to_save=["norm"])),
    "whole-tied": ("gemma2", dict(target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head", "embed_tokens"])),
}


def golden(families, folder, name):
    base, fields = CASES[name]
    model = AutoModelForCausalLM.from_pretrained(families / base, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    draw = lambda n: torch.randint(3, BASE["vocab_size"], (n,), generator=generator)
    completions, data = [draw(9), draw(6)], {}
    for i, prompt in enumerate([draw(14), draw(5)]):
        data |= {f"{i}.prompt": prompt, f"{i}.completion": completions[i], f"{i}.kl": completions[1 - i]}
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **fields))
    trained = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter, p in trained:
            noise = torch.randn(p.shape, generator=generator)
            if "magnitude" in parameter:
                # Lengths away from those that the rows have.
                p.mul_(1 + 0.2 * noise)
            elif "lora_" in parameter:
                p.copy_(noise * 0.2)
            else:
                p.add_(noise * 0.05)
    # Without its adapter a model keeps trained biases in PEFT; the reference is the base as it was.
    base_of = lambda: AutoModelForCausalLM.from_pretrained(families / base, dtype=torch.float32, attn_implementation="eager").eval()
    data |= step(model, data, base_of() if fields.get("bias") else None)
    for parameter, p in trained:
        short = parameter.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
        short = short.replace(".base_layer", "").replace("magnitude_vector.weight", "magnitude_vector")
        data[f"grad/{short}"] = p.grad
    with tempfile.TemporaryDirectory() as saved:
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(saved, save_embedding_layers=False)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(saved) / file, folder / file)
    tensors = {k: (v.to(torch.int32) if v.dtype == torch.int64 else v).contiguous() for k, v in data.items()}
    save_file(tensors, folder / "golden.safetensors")
    largest = max(float(v.abs().max()) for k, v in data.items() if k.startswith("grad/"))
    print(json.dumps({"name": name, "base": base, "loss": float(data["loss"]), "kl": float(data["kl"]),
                      "logps": data["logps"].tolist(), "largest_gradient": largest}))


def main():
    torch.set_num_threads(1)
    families, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name in sys.argv[3:] or CASES:
        golden(families, out / name, name)


if __name__ == "__main__":
    main()
