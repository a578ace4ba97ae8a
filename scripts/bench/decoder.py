"""A model directory of a given shape: the list of its tensors, and the files beside them. Standard library only."""
import json

import nf4
from safetensors_file import write_model as write_tensors


def tensors(shape, dense, linear):
    """The tensors in the order of the file. `dense(name, dims, mean, std)` returns one, `linear(name, outputs, inputs)` the list that
    makes up a weight."""
    norm = lambda name: dense(name, (shape.hidden,), 1.0, 0.05)
    all = [dense("model.embed_tokens.weight", (shape.vocab, shape.hidden), 0.0, 0.02)]
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        all += [norm(at + "input_layernorm.weight"), norm(at + "post_attention_layernorm.weight")]
        for name, inputs, outputs in shape.linears():
            all += linear(f"{at}{name}.weight", outputs, inputs)
            if shape.qkv_bias and name[10:] in ("q_proj", "k_proj", "v_proj"):
                all.append(dense(f"{at}{name}.bias", (outputs,), 0.0, 0.02))
    all.append(norm("model.norm.weight"))
    if not shape.tied:
        all.append(dense("lm_head.weight", (shape.vocab, shape.hidden), 0.0, 0.02))
    return all


def tokenizer(vocab):
    """tokenizer.json: the words w0, w1, …, then padding and end of text."""
    words = {f"w{i}": i for i in range(vocab - 2)}
    special = {"<pad>": vocab - 2, "<eos>": vocab - 1}
    added = [{"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for word, i in special.items()]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words | special, "unk_token": "w0"},
    }


def write(directory, shape, all, dtype, quantized):
    """Writes the directory. `dtype` is what config.json says, `quantized` whether the linear weights are NF4."""
    directory.mkdir(parents=True)
    write_tensors(directory, all)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer(shape.vocab)))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>",
                "model_max_length": shape.positions}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    config = shape.config(dtype) | ({"quantization_config": nf4.QUANTIZATION} if quantized else {})
    # The last file: a directory with a config.json is whole.
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
