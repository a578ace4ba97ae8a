#!/usr/bin/env python3
"""Cuts a BPE tokenizer down to what a fixed list of texts needs, and writes what transformers makes of these texts.

    pip install transformers==5.23.0
    scripts/oracle/reduce_tokenizer.py ROOT testdata/tokenize NAME... > reduced.jsonl

ROOT/NAME holds tokenizer.json and tokenizer_config.json; testdata/tokenize/NAME gets their small forms. A token stays
when it occurs in a text (as the tokenizer sees it), is a control token, or stands for a byte; ids stay what they were.
Of the merges of any of these texts none is lost, so the small tokenizer encodes them as the full one does; the script
checks it. The texts are those of encodings.py and, with GOLDEN=FILE.inp, those of a llama.cpp vocabulary test.
"""

import json
import os
import re
import sys
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from encodings_texts import TEXTS

KEPT_FIELDS = ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")


def words(tokenizer, text):
    """The text in pieces as the model sees them."""
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer:
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return [text]


def reduce(full, texts):
    tokenizer = Tokenizer.from_str(json.dumps(full))
    model = full["model"]
    # Reserved control tokens by the hundred (mistral-v3) would be most of the file.
    full = {**full, "added_tokens": [t for t in full["added_tokens"] if not t["content"].startswith("[control_")]}
    added = {token["content"] for token in full["added_tokens"]}
    # Between control tokens a text is split as if it were a whole one.
    marks = re.compile("|".join(re.escape(token) for token in added))
    pieces = [piece for text in texts for piece in [text, *marks.split(text)]]
    seen = "\n\0".join(word for piece in pieces for word in words(tokenizer, piece))
    byte = {f"<0x{i:02X}>" for i in range(256)}
    # Behind a control token a piece begins anew, with a mark for the blank.
    keep = lambda token: (len(token) == 1 and token in seen) or token in byte or token in added or token.lstrip("▁") in seen
    vocab = {token: i for token, i in model["vocab"].items() if keep(token)}
    # Without this they would be numbered from the end of the small vocabulary.
    vocab |= {token["content"]: tokenizer.token_to_id(token["content"]) for token in full["added_tokens"]}
    pairs = (tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"])
    merges = [[a, b] for a, b in pairs if a in vocab and b in vocab and a + b in vocab]
    small = {key: full[key] for key in KEPT_FIELDS if key in full}
    small["model"] = {**model, "vocab": vocab, "merges": merges}
    return small


def main():
    root, out, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    texts = list(TEXTS)
    if golden := os.environ.get("GOLDEN"):
        texts += Path(golden).read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    for name in names:
        full = json.loads((root / name / "tokenizer.json").read_text(encoding="utf-8"))
        small = reduce(full, texts)
        before, after = Tokenizer.from_str(json.dumps(full)), Tokenizer.from_str(json.dumps(small))
        oracle = AutoTokenizer.from_pretrained(root / name)
        (out / name).mkdir(parents=True, exist_ok=True)
        text = json.dumps(small, ensure_ascii=False, separators=(",", ":"))
        (out / name / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
        for file in ("tokenizer_config.json", "config.json"):
            if (root / name / file).exists():
                config = json.loads((root / name / file).read_text(encoding="utf-8"))
                config.pop("chat_template", None)
                (out / name / file).write_text(json.dumps(config, ensure_ascii=False) + "\n", encoding="utf-8")
        for text in texts:
            assert before.encode(text).ids == after.encode(text).ids, (name, text)
            ids = oracle(text=text)["input_ids"]
            print(json.dumps({"dir": f"tokenize/{name}", "text": text, "ids": ids}, ensure_ascii=False))


if __name__ == "__main__":
    main()
