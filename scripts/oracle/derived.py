#!/usr/bin/env python3
"""Checks kto-convert against a folder of shapes with expected outputs, and HH-RLHF's test pairs for completions that are not whole.

usage: derived.py DIR     DIR holds derived/ (inputs and expected_*.jsonl) and hh-rlhf/harmless-base-test.jsonl.gz

Every input is given as a file and as standard input; the output must be the expected file byte for byte. The data is not part of the
project (size, content).
"""
import gzip
import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "target" / "release" / "kto-convert"
RATINGS = ["--map", "completion=response,label=rating", "--desirable", ">=4", "--undesirable", "<=2", "--chat"]
EXPECTED = {
    "hh_rlhf.jsonl": "hh_rlhf", "orca_dpo_pairs.jsonl": "single", "ratings.csv": "single_nosys",
    **{name: "conversational" for name in (
        "trl_paired_conversational.jsonl", "trl_paired_conversational.jsonl.gz", "trl_paired.arrow", "trl_paired_snappy.parquet",
        "ultrafeedback_binarized.jsonl", "kto_mix.jsonl", "kto_messages_label.jsonl", "sharegpt_kto.jsonl", "openai_preference.jsonl",
        "thumbs_log.jsonl")},
}


def convert(*args, data=None):
    result = subprocess.run([TOOL, "-q", *args], input=data, capture_output=True)
    if result.returncode:
        sys.exit(f"{args}: {result.stderr.decode()}")
    return result.stdout


def shapes(folder):
    for name, expected in EXPECTED.items():
        wanted = (folder / f"expected_{expected}.jsonl").read_bytes()
        args = ["--drop-extra", *(RATINGS if name == "ratings.csv" else [])]
        piped = [*args, *(["--in-format", "csv"] if name.endswith(".csv") else [])]
        ways = {"file": convert(*args, folder / name), "stdin": convert(*piped, data=(folder / name).read_bytes())}
        for way, found in ways.items():
            if found != wanted:
                sys.exit(f"{name} as {way}: not expected_{expected}.jsonl")
        print(f"{name}: expected_{expected}.jsonl, as file and as stdin")


def dialogues(path):
    """The truth of a side: its completion is all that follows the assistant's first marker behind the last human turn."""
    rows = [json.loads(line) for line in gzip.open(path, "rt")]
    for flags in ([], ["--dialogues", "text"]):
        out = convert("--empty", "keep", "--prompts-differ", "keep", *flags, path)
        records = [json.loads(line) for line in out.splitlines()]
        moved = set()
        for i, record in enumerate(records):
            text = rows[i // 2]["rejected" if i % 2 else "chosen"]
            start = text.index("\n\nAssistant:", text.rindex("\n\nHuman:")) + len("\n\nAssistant:")
            whole = text[start:]
            found = record["completion"]
            if not flags:
                whole = "\n\n".join(turn.removeprefix(" ") for turn in whole.split("\n\nAssistant:"))
                found = "".join(turn["content"] for turn in found)
            if found != whole:
                moved.add(i // 2)
        print(f"{path.name} {' '.join(flags)}: {len(moved)} of {len(rows)} rows with text moved")
        if moved or len(records) != 2 * len(rows):
            sys.exit(1)


def main():
    data = Path(sys.argv[1])
    shapes(data / "derived")
    dialogues(data / "hh-rlhf" / "harmless-base-test.jsonl.gz")


if __name__ == "__main__":
    main()
