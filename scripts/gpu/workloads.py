"""Rows of exact lengths as token files: what the plans and the checks of a GPU train."""
import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import decoder
import workload

# Ids that every shape has.
VOCAB = 32768


def rows(folder, name, count, prompt, completion, sharing="unshared", vocab=VOCAB):
    """Writes the records once; returns their file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    if not file.exists():
        records = workload.rows(vocab, 1, count, sharing, (prompt, prompt), (completion, completion), 0)
        file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


def tokenizer(folder, vocab=VOCAB):
    """Writes a directory with the words' tokenizer once; returns it."""
    directory = folder / f"words-{vocab}"
    if not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(json.dumps(decoder.tokenizer(vocab)))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def tokens(binaries, folder, name, count, prompt, completion, sharing="unshared", vocab=VOCAB):
    """Writes rows of so many tokens once, the end of text among them; returns the token file."""
    file = folder / f"{name}.kto.arrow"
    if not file.exists():
        records = rows(folder, name, count, prompt, completion, sharing, vocab)
        command = [binaries / "kto-tokenize", "-q", "--model", tokenizer(folder, vocab), "--max-length", prompt + completion, records, "-o", file]
        subprocess.run([str(c) for c in command], check=True)
    return file
