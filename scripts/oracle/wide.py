"""A random model with the shapes that the peers' fast paths and block forms need."""
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]


def wide_model(folder):
    """A random decoder whose columns are multiples of 256, which the K forms need, with the demo's tokenizer."""
    demo = ROOT / "testdata/demo/model"
    config = json.loads((demo / "config.json").read_text())
    config.update(hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                  tie_word_embeddings=False)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((demo / file).read_bytes())
    random = np.random.default_rng(3)
    heavy = lambda *shape: (random.standard_t(5, shape) * 0.03).astype(np.float32)
    tensors = {"model.embed_tokens.weight": heavy(1024, 256), "lm_head.weight": heavy(1024, 256), "model.norm.weight": np.ones(256, np.float32)}
    shapes = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256), "self_attn.o_proj": (256, 256),
              "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256), "mlp.down_proj": (256, 512)}
    for block in range(8):
        for module, shape in shapes.items():
            tensors[f"model.layers.{block}.{module}.weight"] = heavy(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{norm}.weight"] = np.ones(256, np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder
