#!/usr/bin/env python3
"""KTO on the cases of testdata/trl in float64, without TRL, PEFT or transformers.

usage: trl_float64.py [--root DIR] [--write] CASE...

Own decoder (Llama, Qwen2), LoRA, loss, AdamW and schedules, every row alone and unpadded.
Reads the token ids and the initial adapter of a case; compares loss, kl, grad_norm and learning_rate of
every step with steps_f64, or rewrites that file. How far TRL's float32 is from this gives the tests' tolerances.
"""
import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2] / "testdata/trl"
LORA_SCALE = 2.0  # alpha 16 / r 8 in every case


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Decoder:
    """Decoder of one model directory; `adapter` maps module names to (A, B) or is None."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.w = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
        self.dim = self.config["head_dim"] if self.config.get("head_dim") else (
            self.config["hidden_size"] // self.config["num_attention_heads"])
        rope = self.config["rope_parameters"]
        assert rope["rope_type"] == "default"
        self.inverse = rope["rope_theta"] ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)

    def linear(self, name, x, adapter):
        y = F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))
        if adapter is not None:
            a, b = adapter[name]
            y = y + LORA_SCALE * (x @ a.T) @ b.T
        return y

    def norm(self, name, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.w[f"{name}.weight"]

    def rotate(self, x):
        """Rotates (T, H, D) by position, halves layout."""
        angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * self.inverse
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        one, two = x.chunk(2, -1)
        return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)

    def attention(self, name, x, adapter):
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        length = x.shape[0]
        q = self.rotate(self.linear(f"{name}.q_proj", x, adapter).view(length, heads, self.dim))
        k = self.rotate(self.linear(f"{name}.k_proj", x, adapter).view(length, groups, self.dim))
        v = self.linear(f"{name}.v_proj", x, adapter).view(length, groups, self.dim)
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.dim)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, v).reshape(length, -1)
        return self.linear(f"{name}.o_proj", out, adapter)

    def logp(self, prompt, completion, adapter):
        """Sum of log-probs of the completion ids after the prompt ids."""
        ids = torch.tensor(prompt + completion)
        x = self.w["model.embed_tokens.weight"][ids]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x = x + self.attention(f"{layer}.self_attn", self.norm(f"{layer}.input_layernorm", x), adapter)
            y = self.norm(f"{layer}.post_attention_layernorm", x)
            gate = F.silu(self.linear(f"{layer}.mlp.gate_proj", y, adapter))
            x = x + self.linear(f"{layer}.mlp.down_proj", gate * self.linear(f"{layer}.mlp.up_proj", y, adapter), adapter)
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        start = len(prompt)
        logits = F.linear(self.norm("model.norm", x[start - 1:-1]), head)
        return logits.log_softmax(-1).gather(-1, ids[start:, None]).sum()


def read_adapter(folder):
    """PEFT tensors as {module: (A, B)}, float64, with gradients."""
    tensors = {k.removeprefix("base_model.model."): v.double().requires_grad_()
               for k, v in load_file(folder / "adapter_model.safetensors").items()}
    modules = sorted({k.rsplit(".lora_", 1)[0] for k in tensors})
    return {m: (tensors[f"{m}.lora_A.weight"], tensors[f"{m}.lora_B.weight"]) for m in modules}


def micro_batch(decoder, meta, rows, batch, policy, reference):
    """Loss and z0 of one micro-batch."""
    def ratio(row, completion):
        room = meta["max_length"] - len(row["prompt_ids"])
        with torch.no_grad():
            ref = decoder.logp(row["prompt_ids"], completion[:room], reference)
        return decoder.logp(row["prompt_ids"], completion[:room], policy) - ref

    kl = torch.zeros((), dtype=torch.float64)
    if meta["loss"] == "kto":
        with torch.no_grad():
            kl = torch.stack([ratio(r, rows[r["kl_from_row"]]["completion_ids"]) for r in batch]).mean().clamp(min=0)
    losses = []
    for row in batch:
        gain = ratio(row, row["completion_ids"]) - kl
        weight, sign = (meta["dw"], 1) if row["label"] else (meta["uw"], -1)
        losses.append(weight * (1 - torch.sigmoid(sign * meta["beta"] * gain)))
    return torch.stack(losses).mean(), kl.item()


def rate(meta, step, steps):
    """Learning rate of optimizer step `step`, counted from 0."""
    if step < meta["warmup"]:
        return meta["lr"] * step / meta["warmup"]
    part = (step - meta["warmup"]) / max(1, steps - meta["warmup"])
    return meta["lr"] * {"linear": 1 - part, "cosine": 0.5 * (1 + math.cos(math.pi * part)), "constant": 1.0}[meta["sched"]]


def run(meta, paths):
    """Trains the case; returns the lines of steps_f64 and the final adapter."""
    decoder, rows = Decoder(paths["model"]), read_lines(paths["tokenized"])
    policy = read_adapter(paths["adapter_init"])
    initial = read_adapter(paths["adapter_init"])
    reference = initial if meta["ref"] == "init_adapter" else None
    parameters = [p for pair in policy.values() for p in pair]
    optimizer = torch.optim.AdamW(parameters, lr=meta["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=meta["wd"])
    batches = [rows[i:i + meta["bs"]] for i in range(0, len(rows), meta["bs"])]
    groups = [batches[i:i + meta["ga"]] for i in range(0, len(batches), meta["ga"])] * meta["epochs"]
    lines = []
    for step, group in enumerate(groups):
        results = []
        for batch in group:
            loss, kl = micro_batch(decoder, meta, rows, batch, policy, reference)
            (loss / len(group)).backward()
            results.append((loss.item(), kl))
        norm = torch.nn.utils.clip_grad_norm_(parameters, meta["clip"]).item()
        optimizer.param_groups[0]["lr"] = rate(meta, step, len(groups))
        optimizer.step()
        optimizer.zero_grad()
        loss, kl = (sum(column) / len(results) for column in zip(*results))
        lines.append({"step": step + 1, "loss": loss, "kl": kl, "grad_norm": norm, "learning_rate": rate(meta, step, len(groups))})
    return lines, policy


def compare(name, paths, lines, policy):
    """Prints the distance to steps_f64, and to TRL's float32 run."""
    def worst(expected, key):
        return max(abs(one[key] - two[key]) for one, two in zip(lines, expected, strict=True))

    exact, single = read_lines(paths["steps_f64"]), read_lines(paths["steps"])
    final = read_adapter(paths["adapter_final"])
    distance = max((one - two).abs().max().item() for m in policy for one, two in zip(policy[m], final[m]))
    print(f"{name}: from steps_f64 loss {worst(exact, 'loss'):.1e} kl {worst(exact, 'kl'):.1e} grad_norm "
          f"{worst(exact, 'grad_norm'):.1e} rate {worst(exact, 'learning_rate'):.1e}; TRL's float32: loss "
          f"{worst(single, 'loss'):.1e} kl {worst(single, 'kl'):.1e} final adapter {distance:.1e}", flush=True)
    assert worst(exact, "loss") < 1e-6 and worst(exact, "kl") < 1e-5 and worst(exact, "grad_norm") < 1e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--write", action="store_true", help="replace steps_f64.jsonl")
    parser.add_argument("case", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.case:
        meta = json.loads((args.root / name / "meta.json").read_text())
        paths = {key: args.root / path for key, path in meta["files"].items()}
        lines, policy = run(meta, paths)
        if args.write:
            paths["steps_f64"].write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            compare(name, paths, lines, policy)


if __name__ == "__main__":
    main()
