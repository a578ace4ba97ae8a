#!/usr/bin/env python3
"""TRL's way from pairs to unpaired records: load, extract_prompt, unpair, write. Prints its time without the imports.

usage: peer_convert.py IN.jsonl OUT.jsonl
"""
import json
import resource
import sys
import tempfile
import time

import datasets
from trl.data_utils import extract_prompt, unpair_preference_dataset

datasets.disable_progress_bars()
with tempfile.TemporaryDirectory() as cache:
    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=cache)
    rows = rows.map(extract_prompt)
    rows = unpair_preference_dataset(rows)
    rows.to_json(sys.argv[2], force_ascii=False)
    seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
