#!/usr/bin/env python3
"""Reads a token file with pyarrow and compares every row with what TRL 1.16 makes of the same records.

    pip install trl==1.16.0 transformers==5.23.0 pyarrow
    kto-tokenize --model DIR --allow-special RECORDS.jsonl -o TOKENS.kto.arrow
    scripts/oracle/trl_tokens.py DIR RECORDS.jsonl TOKENS.kto.arrow

Prints how many rows are equal and exits 1 when one is not. Rows whose prompt reaches kto.max_length must be missing.
"""

import hashlib
import json
import sys

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer
from trl.data_utils import _tokenize, common_prefix_length, is_conversational


def tokens(tokenizer, row):
    """The body of tokenize_fn in KTOTrainer._prepare_dataset."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    kwargs = {"tools": tools, **row.get("chat_template_kwargs", {})}
    if is_conversational(row):
        alone = _tokenize(tokenizer, row["prompt"], add_generation_prompt=True, **kwargs)["input_ids"]
        full = _tokenize(tokenizer, row["prompt"] + row["completion"], **kwargs)["input_ids"]
    else:
        completion = row["completion"]
        if not completion.endswith(tokenizer.eos_token):
            completion += tokenizer.eos_token
        alone = _tokenize(tokenizer, row["prompt"])["input_ids"]
        full = _tokenize(tokenizer, row["prompt"] + completion)["input_ids"]
    length = common_prefix_length(alone, full)
    return alone[:length], full[length:]


def prompt_hash(ids):
    """The hash that the format defines."""
    digest = hashlib.sha256(np.asarray(ids, dtype="<u4").tobytes()).digest()
    return int.from_bytes(digest[:8], "little")


def main():
    model, records, path = sys.argv[1:4]
    tokenizer = AutoTokenizer.from_pretrained(model)
    reader = pa.ipc.open_stream(pa.OSFile(path))
    metadata = {k.decode(): v.decode() for k, v in reader.schema.metadata.items()}
    ours = iter(reader.read_all().to_pylist())
    limit = int(metadata["kto.max_length"])
    equal = different = dropped = truncated = 0
    for number, line in enumerate(open(records, encoding="utf-8"), 1):
        row = json.loads(line)
        prompt, completion = tokens(tokenizer, row)
        if len(prompt) >= limit:
            dropped += 1
            continue
        truncated += len(prompt) + len(completion) > limit
        expected = {
            "prompt_ids": prompt,
            "completion_ids": completion[:limit],
            "label": row["label"],
            "prompt_hash": prompt_hash(prompt),
        }
        found = next(ours, None)
        if found == expected:
            equal += 1
        else:
            different += 1
            if different <= 3:
                print(f"row {number} differs:\n  ours {found}\n  TRL  {expected}")
    rest = sum(1 for _ in ours)
    counted = (metadata["kto.rows"], metadata["kto.dropped"], metadata["kto.truncated"])
    if counted != (str(equal + different), str(dropped), str(truncated)):
        print(f"counts differ: rows, dropped, truncated {counted}, TRL {(equal + different, dropped, truncated)}")
        different += 1
    print(f"{equal} rows equal, {different} different, {rest} more than expected, {dropped} dropped, {truncated} truncated")
    sys.exit(1 if different or rest else 0)


if __name__ == "__main__":
    main()
