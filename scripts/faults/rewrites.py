"""The forms in which kto-quantize and kto-merge write, as commands for the fault tests."""
import json
from pathlib import Path

import common


def inputs(work):
    """Makes what the commands need beside work/model and work/trained/adapter: the model in 4 bits of both libraries and as a GGUF file, a
    tuned model."""
    quantize, merge = common.tool("kto-quantize"), common.tool("kto-merge")
    common.must([quantize, "-q", work / "model", "-o", work / "nf4"])
    common.must([quantize, "-q", work / "model", "-o", work / "mlx", "--form", "mlx", "--group-size", 32])
    common.must([quantize, "-q", work / "model", "-o", work / "model.gguf", "--form", "gguf", "--type", "Q8_0"])
    common.must([merge, "-q", "--base", work / "model", "--adapter", work / "trained/adapter", "-o", work / "tuned"])


def commands(work, shard):
    """Yields every form's name, its command without an output, and the name of the output; directories in files of `shard` (size)."""
    quantize, merge = common.tool("kto-quantize"), common.tool("kto-merge")
    model, adapter, shards = work / "model", work / "trained" / "adapter", ["--max-shard-size", shard]
    for form, more in [
        ("nf4", shards),
        ("fp4", ["--form", "fp4", "--no-double-quant", *shards]),
        ("int8", ["--form", "int8", *shards]),
        ("mlx", ["--form", "mlx", "--recipe", "mixed_3_6", "--group-size", 32, *shards]),
        ("gguf", ["--form", "gguf", "--type", "Q8_0"]),
    ]:
        yield f"kto-quantize {form}", [quantize, "-q", model, *more], "out.gguf" if form == "gguf" else "out"
    yield "kto-quantize --dequantize", [quantize, "-q", work / "nf4", "--dequantize", *shards], "out"
    yield "kto-quantize --dequantize GGUF", [quantize, "-q", work / "model.gguf", "--dequantize", *shards], "out"
    yield "kto-quantize --report", [quantize, "-q", model, "--report", "OUT/report.jsonl", *shards], "out"
    one = ["--adapter", adapter]
    for form, words, output in [
        ("bf16", ["--base", model, *one, "--dtype", "bf16", *shards], "out"),
        ("nf4", ["--base", work / "nf4", *one, "--form", "nf4", *shards], "out"),
        ("mlx", ["--base", work / "mlx", *one, "--form", "mlx", *shards], "out"),
        ("gguf", ["--base", model, *one, "--form", "gguf", "--type", "F16"], "out.gguf"),
        ("--to mlx", [*one, "--to", "mlx"], "out"),
        ("--to peft --rank", [*one, "--to", "peft", "--rank", 1], "out"),
        ("--extract", ["--base", model, "--extract", work / "tuned", "--rank", 2], "out"),
    ]:
        yield f"kto-merge {form}", [merge, "-q", *words], output


def told(path):
    """What a manifest says of the outputs; the rest of it names the folder, which is another one each time."""
    return [(Path(entry["path"]).name, entry["sha256"]) for entry in json.loads(path.read_text())["outputs"]]


def content(path):
    """Every file of an output with its hash, of a manifest what it says of the others."""
    return {name: told(path / name) if name.endswith("manifest.json") else digest for name, digest in common.tree(path).items()}
