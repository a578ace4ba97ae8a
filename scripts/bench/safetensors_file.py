"""Writes tensors into safetensors files one after the other, so that a model larger than memory can be written."""
import json
import math

SIZES = {"F32": 4, "BF16": 2, "U8": 1}
SHARD = 2 << 30


class Tensor:
    """A tensor to be: name, dtype, shape, and a function that returns its bytes, in pieces; None leaves a hole in the file."""

    def __init__(self, name, dtype, shape, data):
        self.name, self.dtype, self.shape, self.data = name, dtype, list(shape), data
        self.bytes = math.prod(shape) * SIZES[dtype]


def write_file(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for t in tensors:
        header[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + t.bytes]}
        at += t.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for t in tensors:
            pieces = t.data()
            if pieces is None:
                file.seek(t.bytes, 1)
                continue
            written = sum(file.write(piece) for piece in pieces)
            assert written == t.bytes, t.name
        file.truncate()


def write_model(directory, tensors):
    """Writes model.safetensors, or shards of about 2 GiB with their index."""
    shards, size = [[]], 0
    for t in tensors:
        if shards[-1] and size + t.bytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.bytes
    if len(shards) == 1:
        write_file(directory / "model.safetensors", shards[0])
        return
    index = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_file(directory / name, shard)
        index.update({t.name: name for t in shard})
    total = sum(t.bytes for t in tensors)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (directory / "model.safetensors.index.json").write_text(text + "\n")
