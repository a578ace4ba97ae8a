#!/usr/bin/env python3
"""Encodes a fixed list of texts with transformers and writes one JSON object a line: dir, text, ids.

    pip install transformers==5.23.0
    scripts/oracle/encodings.py ROOT DIR... > encodings.jsonl
    scripts/oracle/encodings.py testdata trl/llama/model trl/qwen2/model stories260k > testdata/tokenize/encodings.jsonl
    KTO_ENCODINGS=ROOT cargo test --release -p kto-formats -- --ignored encodings    # reads ROOT/encodings.jsonl

DIR is a model directory below ROOT. The ids are those of `tokenizer(text=…)`, special tokens included.
"""

import json
import sys

from transformers import AutoTokenizer

from encodings_texts import TEXTS


def main():
    root, dirs = sys.argv[1], sys.argv[2:]
    for name in dirs:
        tokenizer = AutoTokenizer.from_pretrained(f"{root}/{name}")
        for text in TEXTS:
            ids = tokenizer(text=text)["input_ids"]
            print(json.dumps({"dir": name, "text": text, "ids": ids}, ensure_ascii=False))


if __name__ == "__main__":
    main()
