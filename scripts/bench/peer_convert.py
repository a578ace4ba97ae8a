#!/usr/bin/env python3
"""TRL's way from pairs to unpaired records: load, extract_prompt, unpair, write. Prints its time without the imports.

usage: peer_convert.py IN.jsonl OUT.jsonl PROCESSES
"""
import json
import resource
import sys
import tempfile
import time

import datasets
from trl.data_utils import extract_prompt, unpair_preference_dataset

datasets.disable_progress_bars()


def cpu_seconds():
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


with tempfile.TemporaryDirectory() as cache:
    processes = int(sys.argv[3]) if int(sys.argv[3]) > 1 else None
    start, cpu = time.perf_counter(), cpu_seconds()
    rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=cache)
    rows = rows.map(extract_prompt, num_proc=processes)
    rows = unpair_preference_dataset(rows, num_proc=processes)
    rows.to_json(sys.argv[2], force_ascii=False, num_proc=processes)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
