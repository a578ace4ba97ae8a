"""A random Llama of two layers (hidden 64) with the tokenizer of testdata/demo: small enough to train in milliseconds."""
import array
import json
import shutil
from pathlib import Path

from safetensors_file import Tensor, write_file

DEMO = Path(__file__).resolve().parents[2] / "testdata" / "demo" / "model"
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, INNER = 64, 2, 4, 2, 16, 160


def write(directory, numbers):
    """Writes the model directory with weights drawn from the generator `numbers`."""
    directory.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(DEMO / name, directory / name)
    config = json.loads((DEMO / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
               "head_dim": HEAD, "intermediate_size": INNER, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    def drawn(*shape):
        count = shape[0] * shape[1]
        return shape, lambda: [array.array("f", (numbers.gauss(0, 0.08) for _ in range(count))).tobytes()]

    ones = (HIDDEN,), lambda: [array.array("f", [1.0] * HIDDEN).tobytes()]
    shapes = {"model.embed_tokens": drawn(config["vocab_size"], HIDDEN), "model.norm": ones}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm": ones, f"{at}.post_attention_layernorm": ones,
                   f"{at}.self_attn.q_proj": drawn(HEADS * HEAD, HIDDEN), f"{at}.self_attn.k_proj": drawn(KV_HEADS * HEAD, HIDDEN),
                   f"{at}.self_attn.v_proj": drawn(KV_HEADS * HEAD, HIDDEN), f"{at}.self_attn.o_proj": drawn(HIDDEN, HEADS * HEAD),
                   f"{at}.mlp.gate_proj": drawn(INNER, HIDDEN), f"{at}.mlp.up_proj": drawn(INNER, HIDDEN),
                   f"{at}.mlp.down_proj": drawn(HIDDEN, INNER)}
    write_file(directory / "model.safetensors", [Tensor(f"{n}.weight", "F32", s, data) for n, (s, data) in sorted(shapes.items())])
