#!/usr/bin/env python3
"""KTOTrainer's tokenization by datasets.map with the same tokenizer and chat template, then the comparison with a token file.

usage: peer_tokenize.py MODEL RECORDS.jsonl TOKENS.kto.arrow PROCESSES

Prints the time of `map` alone: loading, imports and the comparison are left out.
"""
import json
import resource
import sys
import tempfile
import time

import datasets
import pyarrow as pa
from transformers import AutoTokenizer

MODEL, RECORDS, TOKENS, PROCESSES = sys.argv[1:]
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(MODEL)


def tokenize(row):
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    both = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=True)["input_ids"]
    cut = 0
    for a, b in zip(prompt, both):
        if a != b:
            break
        cut += 1
    return {"prompt_ids": both[:cut], "completion_ids": both[cut:]}


with tempfile.TemporaryDirectory() as cache:
    rows = datasets.load_dataset("json", data_files=RECORDS, split="train", cache_dir=cache)
    processes = int(PROCESSES)
    start = time.perf_counter()
    mapped = rows.map(tokenize, num_proc=processes if processes > 1 else None)
    seconds = time.perf_counter() - start
    with pa.ipc.open_stream(TOKENS) as stream:
        ours = stream.read_all()
    wanted = zip(mapped["prompt_ids"], mapped["completion_ids"])
    found = zip(ours["prompt_ids"].to_pylist(), ours["completion_ids"].to_pylist())
    different = abs(len(mapped) - len(ours)) + sum(a != b for a, b in zip(wanted, found))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": seconds, "different": different, "peak": usage.ru_maxrss * 1024}))
