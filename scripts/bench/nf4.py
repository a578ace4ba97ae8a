"""Weights in the form of bitsandbytes NF4 with double quantization: given codes and scales, nothing is quantized. Standard library only."""
import json
import math
import struct

from safetensors_file import Tensor

BLOCK, NESTED_BLOCK = 64, 256
# The 16 values of NF4.
CODE = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
QUANTIZATION = {
    "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False, "quant_method": "bitsandbytes",
}


def f32(value):
    """Rounds to float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def floats(values):
    return struct.pack(f"<{len(values)}f", *values)


def dynamic_map():
    """The 256 values of the signed 8-bit dynamic map, ascending."""
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade
        edges = [f32(0.1 + i * (0.9 / steps)) for i in range(steps)] + [1.0]
        for low, high in zip(edges, edges[1:]):
            mean = f32(f32(low + high) / 2 * f32(10.0 ** (decade - 6)))
            values += [mean, -mean]
    return sorted(values)


MAP = floats(dynamic_map())


def weight(name, outputs, inputs, draw, std):
    """Returns the tensors of one weight (outputs, inputs). `draw(n)` returns the pieces of n bytes, or None for a hole; with random
    bytes the values have about this standard deviation."""
    n = outputs * inputs
    blocks = -(-n // BLOCK)
    nested = -(-blocks // NESTED_BLOCK)
    offset = f32(std / math.sqrt(sum(c * c for c in CODE) / len(CODE)))
    state = json.dumps({
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [outputs, inputs],
        "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}).encode()
    return [
        Tensor(f"{name}.absmax", "U8", [blocks], lambda: draw(blocks)),
        Tensor(f"{name}.quant_map", "F32", [16], lambda: [floats(CODE)]),
        Tensor(f"{name}.quant_state.bitsandbytes__nf4", "U8", [len(state)], lambda: [state]),
        # Scales lie within a third of their mean.
        Tensor(f"{name}.nested_absmax", "F32", [nested], lambda: [floats([offset / 3]) * nested]),
        Tensor(f"{name}.nested_quant_map", "F32", [256], lambda: [MAP]),
        Tensor(name, "U8", [-(-n // 2), 1], lambda: draw(-(-n // 2))),
    ]
