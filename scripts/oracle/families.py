#!/usr/bin/env python3
"""Makes a tiny random model for each family and rope scaling, and what transformers and PEFT compute with it.

    pip install transformers==5.23.0 peft==0.21.2 torch
    scripts/oracle/families.py testdata/families [NAME...]

NAME/ gets config.json, model.safetensors (bf16) and golden.safetensors (f32 on the CPU, eager attention, one sequence at a
time): ids.short and ids.long with logits.short and logits.long (the long ones pass every window and original length), and the
rotary frequencies in use, rope.LENGTH/LAYERTYPE, with their factor; for one
KTO step of two rows at beta 0.3, i.prompt, i.completion, i.kl (the other row's completion); the LoRA matrices
(lora/MODULE.lora_A.weight, rank 2, alpha 3) and the gradients of the loss (grad/…); logps, reference_logps, kl, loss. Row 0
is desirable, row 1 is not; kl is the clamped mean over both rows. Values of weights are exact in bf16, so f32 has them too.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

BETA, RANK, ALPHA = 0.3, 2, 3
SHORT, LONG = 12, 28
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
BASE = dict(
    vocab_size=48, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)


def rope(kind, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


LONGROPE = rope("longrope", short_factor=[1.0, 1.1, 1.3, 1.7], long_factor=[1.2, 2.0, 4.0, 8.0])
PARTIAL = rope("longrope", short_factor=[1.0, 1.3], long_factor=[1.5, 4.0], partial_rotary_factor=0.5)
FAMILIES = {
    "llama3": ("llama", dict(rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                  original_max_position_embeddings=16), tie_word_embeddings=True)),
    "llama-linear": ("llama", rope("linear", factor=2.5)),
    "llama-dynamic": ("llama", dict(rope("dynamic", factor=2.0), max_position_embeddings=16)),
    "llama-yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.1)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral-window": ("mistral", dict(sliding_window=8, head_dim=16)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2-yarn": ("qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.2)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "phi3": ("phi3", dict(sliding_window=8)),
    "phi3-longrope": ("phi3", dict(LONGROPE, original_max_position_embeddings=16, partial_rotary_factor=1.0)),
    "phi3-partial": ("phi3", dict(rope("default", partial_rotary_factor=0.5), partial_rotary_factor=0.5)),
    "phi4-mini": ("phi3", dict(PARTIAL, original_max_position_embeddings=16, partial_rotary_factor=0.5,
                               tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(head_dim=16, query_pre_attn_scalar=12, sliding_window=8, attn_logit_softcapping=5.0,
                              final_logit_softcapping=3.0)),
    "gemma3": ("gemma3_text", dict(head_dim=16, query_pre_attn_scalar=12, sliding_window=8, num_hidden_layers=3,
                                   layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    # Images too: the language model is a part of it. Fields that have their defaults are left out, as published files leave them out.
    "gemma3-images": ("gemma3", dict(
        text_config=dict(BASE, head_dim=16, query_pre_attn_scalar=12, sliding_window=8, num_hidden_layers=3, rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}, sliding_window_pattern=2),
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                           patch_size=14),
        mm_tokens_per_image=4, image_token_index=47, boi_token_index=45, eoi_token_index=46)),
    "stablelm": ("stablelm", dict(use_qkv_bias=True, partial_rotary_factor=0.5)),
    "stablelm-plain": ("stablelm", dict(rope("default", partial_rotary_factor=0.25), num_key_value_heads=4)),
}


def fill(model, seed):
    """Random weights that no part of the model is blind to: norms away from 1, biases away from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(noise * (0.35 if "embed" in name else 0.25))
            elif name.endswith("bias"):
                p.copy_(noise * 0.2)
            else:
                # Gemma's norms hold what is added to 1.
                p.copy_(noise * 0.2 + (0.0 if "gemma" in type(model).__name__.lower() else 1.0))


def make(name, out):
    model_type, fields = FAMILIES[name]
    fields = {k: v for k, v in {**({} if "text_config" in fields else BASE), **fields}.items() if v is not None}
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, seed=sum(map(ord, name)))
    model = model.to(torch.bfloat16)
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        folder.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(Path(saved) / file, folder / file)
    if "text_config" in fields:
        spare(folder / "config.json", type(config.text_config))
    return folder


def spare(path, kind):
    """Leaves out of the part of a configuration what is a default."""
    config, defaults = json.loads(path.read_text()), kind().to_dict()
    part = config["text_config"]
    config["text_config"] = {k: v for k, v in part.items() if k == "model_type" or defaults.get(k, v) != v}
    path.write_text(json.dumps(config, indent=2) + "\n")


def forget(model):
    """Dynamic scaling depends on the longest sequence so far; here each sequence stands for itself."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.inv_freq, module.max_seq_len_cached = module.original_inv_freq, module.original_max_seq_len


def rotation(model, length):
    """The frequencies in use, and the factor of sine and cosine."""
    module = getattr(model.model, "language_model", model.model).rotary_emb
    found = {}
    for name, buffer in module.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            kind = name.removesuffix("inv_freq").rstrip("_") or "all"
            factor = getattr(module, f"{kind}_attention_scaling" if kind != "all" else "attention_scaling", 1.0)
            found[f"rope.{length}/{kind}"] = buffer.clone()
            found[f"rope.{length}/{kind}.factor"] = torch.tensor([float(factor)])
    return found


def logits(model, ids):
    forget(model)
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0]


def logps(model, prompt, completion):
    forget(model)
    ids = torch.cat([prompt, completion])
    scores = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return scores.gather(1, completion[:, None]).sum()


def step(model, data, base=None):
    """The loss of TRL's KTO over two rows, and its gradients. The reference is the model without its adapter, or `base`."""
    rows = [(data[f"{i}.prompt"], data[f"{i}.completion"], data[f"{i}.kl"]) for i in range(2)]
    policy = torch.stack([logps(model, p, c) for p, c, _ in rows])
    with torch.no_grad():
        shifted = torch.stack([logps(model, p, k) for p, _, k in rows])
        with model.disable_adapter() if base is None else contextlib.nullcontext():
            reference = torch.stack([logps(base or model, p, c) for p, c, _ in rows])
            shifted_reference = torch.stack([logps(base or model, p, k) for p, _, k in rows])
    kl = (shifted - shifted_reference).mean().clamp(min=0)
    ratio = policy - reference
    losses = torch.stack([1 - torch.sigmoid(BETA * (ratio[0] - kl)), 1 - torch.sigmoid(BETA * (kl - ratio[1]))])
    losses.mean().backward()
    return dict(logps=policy.detach(), reference_logps=reference, kl=kl[None], loss=losses.mean().detach()[None])


def golden(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    generator = torch.Generator().manual_seed(7)
    draw = lambda n: torch.randint(3, BASE["vocab_size"], (n,), generator=generator)
    data = {"ids.short": draw(SHORT), "ids.long": draw(LONG)}
    for length in ("short", "long"):
        data[f"logits.{length}"] = logits(model, data[f"ids.{length}"])
        data |= rotation(model, length)
    completions = [draw(9), draw(6)]
    for i, prompt in enumerate([draw(14), draw(5)]):
        data |= {f"{i}.prompt": prompt, f"{i}.completion": completions[i], f"{i}.kl": completions[1 - i]}
    fused = "phi3" in model.config.model_type
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=FUSED if fused else SEPARATE, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if "lora_" in n):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    data |= step(model, data)
    for name, p in model.named_parameters():
        if "lora_" in name:
            short = name.removeprefix("base_model.model.").replace(".default", "").replace("model.language_model.", "model.")
            if "vision" in short:
                continue
            data[f"lora/{short}"], data[f"grad/{short}"] = p.detach(), p.grad
    tensors = {k: (v.to(torch.int32) if v.dtype == torch.int64 else v).contiguous() for k, v in data.items()}
    save_file(tensors, folder / "golden.safetensors")
    largest = max(float(v.abs().max()) for k, v in data.items() if k.startswith("grad/"))
    print(json.dumps({"name": folder.name, "loss": float(data["loss"]), "kl": float(data["kl"]),
                      "logps": data["logps"].tolist(), "largest_gradient": largest}))


def main():
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for name in sys.argv[2:] or FAMILIES:
        golden(make(name, out))


if __name__ == "__main__":
    main()
