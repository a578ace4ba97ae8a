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

TEXTS = [
    "",
    " ",
    "\n",
    "Hello world",
    " Hello  world ",
    "  two  spaces\n\n  and lines\r\n\tend\t ",
    "héllo ÅÄ ñ ß 日本語 한국어 العربية Ελληνικά",
    "🤗🤗🏽👨‍👩‍👧 e\u0301 \u00e9 ﬁ ½ Ⅳ",
    "123 4567 89,000.50 1e-5 0x1F",
    "don't we'll I'M you've THEY'RE",
    "<s>x</s> [INST] y [/INST]",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|user|>\n hi<|end|>\n a <|assistant|>  b",
    "a<|endoftext|> b <|endoftext|>c",
    "<tool_call>\n{\"name\": \"f\"}\n</tool_call><think>x</think>",
    "def f(x):\n    return x ** 2  # ok\n",
    "\u00a0nb\u3000sp\u200bzw\ufeffbom",
    "\u0000nul\u0007bel",
    "ÀÉÎÕÜ" * 5,
    "▁▁ already ▁ there",
    "a" * 200,
    "Question: What? Answer:",
    "Q\n\nHuman: hi\n\nAssistant: ho",
]


def main():
    root, dirs = sys.argv[1], sys.argv[2:]
    for name in dirs:
        tokenizer = AutoTokenizer.from_pretrained(f"{root}/{name}")
        for text in TEXTS:
            ids = tokenizer(text=text)["input_ids"]
            print(json.dumps({"dir": name, "text": text, "ids": ids}, ensure_ascii=False))


if __name__ == "__main__":
    main()
