"""Random weights in the form of bitsandbytes NF4 with double quantization: random codes and scales, nothing is quantized."""
import json

import numpy as np

from safetensors_file import Tensor

BLOCK, NESTED_BLOCK = 64, 256
# The 16 values of NF4.
CODE = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)
QUANTIZATION = {
    "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False, "quant_method": "bitsandbytes",
}


def dynamic_map():
    """The 256 values of the signed 8-bit dynamic map, ascending."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2**decade + 1, dtype=np.float32)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


def weight(name, outputs, inputs, rng, std):
    """Returns the tensors of one weight (outputs, inputs) whose values have about this standard deviation."""
    n = outputs * inputs
    blocks = -(-n // BLOCK)
    nested = -(-blocks // NESTED_BLOCK)
    offset = float(np.float32(std / np.sqrt(np.mean(CODE**2))))
    state = json.dumps({
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [outputs, inputs],
        "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}).encode()
    constant = lambda array: lambda: [array.astype("<f4").tobytes()]
    return [
        Tensor(f"{name}.absmax", "U8", [blocks], lambda: [rng.bytes(blocks)]),
        Tensor(f"{name}.quant_map", "F32", [16], constant(CODE)),
        Tensor(f"{name}.quant_state.bitsandbytes__nf4", "U8", [len(state)], lambda: [state]),
        # Scales lie within a third of their mean.
        Tensor(f"{name}.nested_absmax", "F32", [nested], constant(np.full(nested, offset / 3))),
        Tensor(f"{name}.nested_quant_map", "F32", [256], constant(dynamic_map())),
        Tensor(name, "U8", [-(-n // 2), 1], lambda: [rng.bytes(-(-n // 2))]),
    ]
