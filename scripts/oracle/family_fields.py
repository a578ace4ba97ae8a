#!/usr/bin/env python3
"""Finds out what transformers makes of fields of config.json that belong to other families, and of fields that are left out.

    pip install transformers==5.23.0 torch
    scripts/oracle/family_fields.py testdata/families > testdata/families/fields.json

Each of the tiny models is loaded with an edited config.json (fields that are set, and such that are removed) and computes the logits of
28 tokens in f32. "ignored": they are those of the model as it is; "obeyed": they are others; "refused": transformers raises. "window" is
what the loaded configuration has for `sliding_window`.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

MODELS = ["llama-biases", "mistral-window", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "stablelm"]
TURN = {"rope_theta": 10000.0, "rope_type": "default"}
LINEAR = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
EDITS = {
    "partial": {"partial_rotary_factor": 0.25},
    "partial in rope_parameters": {"rope_parameters": dict(TURN, partial_rotary_factor=0.25)},
    "partial of linear": {"rope_parameters": dict(LINEAR, partial_rotary_factor=0.25)},
    "attention cap": {"attn_logit_softcapping": 0.5},
    "logit cap": {"final_logit_softcapping": 0.5},
    "no attention cap": {"attn_logit_softcapping": "null"},
    "query scalar": {"query_pre_attn_scalar": 5},
    "layer types": {"layer_types": "alternating"},
    "layer types without a window": {"layer_types": "alternating", "sliding_window": "null"},
    "full layers": {"layer_types": "full"},
    "window": {"sliding_window": 4},
    "window in use": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    "window not said": {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None},
    "no window": {"sliding_window": "null"},
    "no window and no types": {"sliding_window": "null", "layer_types": None},
    "activation": {"hidden_act": "gelu_pytorch_tanh"},
    "hidden activation": {"hidden_activation": "silu"},
}


def resolved(layers, edit):
    """What is set (null is written "null" above), and what is removed (None)."""
    fields, removed = {}, [field for field, value in edit.items() if value is None]
    for field, value in edit.items():
        if value == "null":
            fields[field] = None
        elif value in ("alternating", "full"):
            kinds = ["full_attention", "sliding_attention" if value == "alternating" else "full_attention"]
            fields[field] = [kinds[i % 2] for i in range(layers)]
        elif value is not None:
            fields[field] = value
    return fields, removed


def logits(folder, config):
    with tempfile.TemporaryDirectory() as top:
        shutil.copy(folder / "model.safetensors", top)
        (Path(top) / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(top, dtype=torch.float32, attn_implementation="eager")
        model.eval()
        ids = torch.tensor([[3 + (7 * i) % 41 for i in range(28)]])
        with torch.no_grad():
            return type(model).__name__, model(ids).logits, getattr(model.config, "sliding_window", None)


def main():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root, cases = Path(sys.argv[1]), []
    for name in MODELS:
        config = json.loads((root / name / "config.json").read_text())
        own, plain, _ = logits(root / name, config)
        for what, edit in EDITS.items():
            fields, removed = resolved(config["num_hidden_layers"], edit)
            new = {field: value for field, value in (config | fields).items() if field not in removed}
            case = {"model": name, "what": what, "set": fields, "removed": removed}
            try:
                found, out, window = logits(root / name, new)
            except Exception as error:  # whatever it raises
                print(name, what, str(error).splitlines()[0][:150], file=sys.stderr)
                cases.append(case | {"found": "refused"})
                continue
            same = "ignored" if torch.equal(out, plain) else "obeyed"
            more = {} if found == own else {"class": found}
            cases.append(case | {"found": same, "window": window} | more)
    lines = ",\n".join(json.dumps(case) for case in cases)
    print(f"[\n{lines}\n]")


main()
