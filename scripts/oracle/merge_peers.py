#!/usr/bin/env python3
"""Checks kto-merge against PEFT: adapters of every kind, merged by both, compared tensor by tensor and in their logits.

usage: merge_peers.py [MODEL_DIR...]      default: those of testdata/trl, and every family of testdata/families

For each model PEFT makes random adapters (plain, rslora, DoRA, ranks and alphas by module, modules_to_save, embedding, MLP only) and merges
them (merge_and_unload, f32). kto-merge merges the same files; then the adapter goes to MLX's form and back and is merged once more. Ends
with 1 when a weight or a logit is off by more than f32's rounding. Needs torch, transformers, peft (made with 2.15.0, 5.23.0, 0.21.2).
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
MERGE = ROOT / "target" / "release" / "kto-merge"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": dict(r=4, lora_alpha=8, target_modules=ALL),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True, target_modules=ALL),
    "dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=ALL),
    "patterns": dict(r=4, lora_alpha=8, target_modules=ALL, rank_pattern={"up_proj": 2, "layers.1.self_attn.q_proj": 7},
                     alpha_pattern={"down_proj": 3, "up_proj": 32}),
    "saved": dict(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"]),
    "embedding": dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "v_proj"]),
    "some": dict(r=2, lora_alpha=1, target_modules=["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]),
}
# Where q, k, v are one matrix, gate and up another.
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
FUSED_KINDS = {
    "plain": dict(r=4, lora_alpha=8, target_modules=FUSED),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True, target_modules=FUSED),
    "dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=FUSED),
    "patterns": dict(r=4, lora_alpha=8, target_modules=FUSED, rank_pattern={"gate_up_proj": 2}, alpha_pattern={"qkv_proj": 3}),
    "saved": dict(r=3, lora_alpha=6, target_modules=["qkv_proj", "down_proj"], modules_to_save=["norm"]),
}
# Where the language model lies in one that takes images too; kto-merge makes a text model of it.
PART = "model.language_model."
failures = []


def check(ok, text):
    print(("ok    " if ok else "FAIL  ") + text)
    if not ok:
        failures.append(text)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def logits(model):
    ids = torch.arange(40).reshape(1, 40) * 5 % model.config.get_text_config().vocab_size
    with torch.no_grad():
        return model(ids).logits


def in_part(settings):
    """The settings that adapt the language model alone."""
    names = [name.removeprefix("model.") for name in settings["target_modules"]]
    return dict(settings, target_modules=PART.replace(".", r"\.") + r"(?:.*\.)?(?:" + "|".join(names).replace(".", r"\.") + ")")


def own_weights(model):
    """The weights by their names in a text model."""
    state = model.state_dict()
    part = {key.replace(PART, "model."): value for key, value in state.items() if PART in key or key.startswith("lm_head.")}
    return part if any(PART in key for key in state) else dict(state)


def merge(*words):
    subprocess.run([MERGE, "-q", *words], check=True, stdout=subprocess.DEVNULL)


def compare(name, path, expected, logits_expected, rounding=2e-6):
    ours = load(path)
    state = own_weights(ours)
    worst = max(float((state[key] - value).abs().max() / value.abs().max().clamp(min=1e-3)) for key, value in expected.items())
    off = float((logits(ours) - logits_expected).abs().max() / logits_expected.abs().max())
    check(worst < rounding and off < 10 * rounding, f"{name}: weights off by {worst:.2g} of the largest, logits by {off:.2g}")


def defaults():
    families = [d for d in sorted((ROOT / "testdata/families").iterdir()) if d.is_dir()]
    return [ROOT / "testdata/trl/llama/model", ROOT / "testdata/trl/qwen2/model", *families]


for folder in sys.argv[1:] or defaults():
    folder = Path(folder)
    short = folder.parent.name if folder.name == "model" else folder.name
    fused, images = load(folder).config.model_type == "phi3", load(folder).config.model_type == "gemma3"
    for kind, settings in (FUSED_KINDS if fused else KINDS).items():
        if kind == "embedding" and load(folder).config.tie_word_embeddings:
            continue
        if images:
            if kind == "saved":
                continue
            settings = in_part(settings)
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            torch.manual_seed(5)
            model = get_peft_model(load(folder), LoraConfig(task_type="CAUSAL_LM", **settings))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * (0.1 if "magnitude" in name else 0.05))
            model.save_pretrained(work / "adapter")
            fresh = PeftModel.from_pretrained(load(folder), work / "adapter")
            with_adapter = logits(fresh)
            merged = fresh.merge_and_unload()
            expected = {k: v.clone() for k, v in own_weights(merged).items()}
            name = f"{short} {kind}"
            check(float((logits(merged) - with_adapter).abs().max()) < 1e-4, f"{name}: PEFT's merge is its own adapter")
            merge("--base", folder, "--adapter", work / "adapter", "--dtype", "f32", "-o", work / "merged")
            compare(name, work / "merged", expected, with_adapter)
            if kind in ("patterns", "saved", "embedding"):
                continue
            merge("--adapter", work / "adapter", "--to", "mlx", "-o", work / "mlx")
            merge("--adapter", work / "mlx", "--to", "peft", "-o", work / "back")
            merge("--base", folder, "--adapter", work / "mlx", "--dtype", "f32", "-o", work / "of mlx")
            compare(f"{name}, through MLX's form", work / "of mlx", expected, with_adapter)
            again = PeftModel.from_pretrained(load(folder), work / "back")
            off = float((logits(again) - with_adapter).abs().max() / with_adapter.abs().max())
            check(off < 1e-6, f"{name}: PEFT reads what came back, logits off by {off:.2g}")
            if kind == "plain":
                merge("--base", folder, "--extract", work / "merged", "--rank", "4", "-o", work / "extracted")
                third = PeftModel.from_pretrained(load(folder), work / "extracted")
                off = float((logits(third) - with_adapter).abs().max() / with_adapter.abs().max())
                check(off < 2e-5, f"{name}: extracted from the merged model again, logits off by {off:.2g}")
sys.exit(bool(failures))
