#!/usr/bin/env python3
"""Times the data tools beside their peers: kto-convert beside jq and TRL, kto-tokenize beside datasets.map.

usage: data.py [--out DIR] [--date YYYY-MM-DD] [--rounds N] [--pairs N] [convert] [tokenize] [memory]

convert   pairs of dialogues in JSON Lines to unpaired records of text, which is what TRL makes of them: kto-convert (whole process and work:
          strict parsing, split, checks, duplicates), `jq` (writes both sides as lines, splits and checks nothing), TRL (load_dataset,
          extract_prompt, unpair_preference_dataset, to_json; with one process as it is by default, and with as many as there are cores).
          All read the same file and write a file, one after the other, round after round; the order turns. TRL, which takes most of the time,
          runs in every second round, and its time is without its imports. Beside it kto-convert's default, dialogues as messages,
          which no peer makes.
tokenize  records to token ids with one tokenizer and template: kto-tokenize (whole process), datasets.map as KTOTrainer does it, with
          one process and with as many as there are cores. The ids must be the same. Also with the records shuffled, so that the sides of a
          pair do not follow one another.
memory    peak resident set of kto-convert on a generated stream of 10 GB through a pipe.

The files are large enough that starting a process (5 ms) does not count.
"""
import argparse
import datetime
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import machine

BIN = machine.ROOT / "target" / "release"
HERE = Path(__file__).resolve().parent
JQ = '. as $r | ({text: $r.chosen, label: true, id: $r.id}), ({text: $r.rejected, label: false, id: $r.id})'


MADE = random.Random(0)
WORDS = sorted({"".join(MADE.choices("etaoinshrdlucmfw", k=MADE.randint(1, 9))) for _ in range(8000)}, key=lambda word: (len(word), word))
# As in language, the n-th word is n times as rare as the first, and short words are frequent.
WEIGHTS = list(itertools.accumulate(1 / (i + 1) for i in range(len(WORDS))))


def words(rng, n):
    return " ".join(rng.choices(WORDS, cum_weights=WEIGHTS, k=n))


def pairs(rng, count):
    """Dialogues of 1 to 4 rounds in HH-RLHF's form; both sides often begin alike, as real ones do."""
    for i in range(count):
        rounds = "".join(f"\n\nHuman: {words(rng, rng.randint(5, 40))}?\n\nAssistant: {words(rng, rng.randint(10, 60))}."
                         for _ in range(rng.randint(0, 3)))
        prompt = f"{rounds}\n\nHuman: {words(rng, rng.randint(5, 40))}?\n\nAssistant:"
        begin = " I " if i % 3 else " "
        sides = [f"{prompt}{begin}{words(rng, rng.randint(5, 80))}. \"é\"" for _ in range(2)]
        yield json.dumps({"id": i, "chosen": sides[0], "rejected": sides[1]}, ensure_ascii=False) + "\n"


def timed(command, stdout, feed=None):
    """Wall and CPU seconds of a process, to whose standard input `feed` may write, and its peak resident set in bytes."""
    start, peak = time.perf_counter(), 0
    with open(stdout, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stdin=subprocess.PIPE if feed else None)
        gone = threading.Event()

        def watch():
            # The peak that wait4 tells is no less than that of this process.
            nonlocal peak
            while not gone.wait(0.005):
                peak = max(peak, machine.peaks(process.pid)[0])

        watcher = threading.Thread(target=watch)
        watcher.start()
        if feed:
            feed(process.stdin)
            process.stdin.close()
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    gone.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak": peak}


def peer(script, *args):
    """A run of a Python peer, which prints its own time as JSON."""
    command = [sys.executable, str(HERE / script), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-2000:])
    return json.loads(result.stdout.splitlines()[-1])


def rounds(sides, count, slow=()):
    """Runs every side once a round, in turning order; the slow ones in every second round."""
    results = {name: [] for name in sides}
    for i in range(count):
        names = [name for name in sides if i % 2 == 0 or name not in slow]
        for name in names if i % 4 < 2 else reversed(names):
            results[name].append(sides[name]())
            print(f"  {name}: {results[name][-1]['seconds']:.2f} s", flush=True)
    return results


def summary(results, size):
    out = {}
    for name, runs in results.items():
        seconds = [r["seconds"] for r in runs]
        median = statistics.median(seconds)
        out[name] = {"median_seconds": median, "min_seconds": min(seconds), "max_seconds": max(seconds),
                     "mb_per_second": size / 1e6 / median, "runs": runs}
        out[name]["peak"] = max(r["peak"] for r in runs)
    return out


def convert(args, folder):
    data = folder / "pairs.jsonl"
    rng = random.Random(1)
    with open(data, "w") as f:
        f.writelines(pairs(rng, args.pairs))
    size = data.stat().st_size
    ours = [str(BIN / "kto-convert"), "-q", str(data)]
    text = [*ours, "--dialogues", "text"]
    cores = os.cpu_count()
    many = f"TRL, {cores} processes"
    sides = {
        "kto-convert, text": lambda: timed(text, folder / "text.jsonl"),
        "kto-convert, text, one thread": lambda: timed([*text, "--threads", "1"], folder / "one.jsonl"),
        "kto-convert, messages": lambda: timed(ours, folder / "ours.jsonl"),
        "jq": lambda: timed(["jq", "-c", JQ, str(data)], folder / "jq.jsonl"),
        "TRL": lambda: peer("peer_convert.py", data, folder / "trl.jsonl", 1),
        many: lambda: peer("peer_convert.py", data, folder / "trl.jsonl", cores),
    }
    results = rounds(sides, args.rounds, slow=("TRL", many))
    assert (folder / "text.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes(), "threads changed the bytes"
    # TRL moves what both completions begin with into the prompt; ours must give the whole completions.
    moved = 0
    with open(folder / "text.jsonl") as mine, open(folder / "trl.jsonl") as theirs:
        own = {(r["id"], r["label"]): r["completion"] for r in map(json.loads, mine)}
        moved = sum(own[r["id"], r["label"]] != r["completion"] for r in map(json.loads, theirs))
    return {"size": size, "rows": args.pairs, "records_moved_by_trl": moved, "sides": summary(results, size)}


def tokenize(args, folder):
    model = machine.ROOT / "testdata" / "demo" / "model"
    data, records, shuffled = folder / "pairs2.jsonl", folder / "records.jsonl", folder / "shuffled.jsonl"
    with open(data, "w") as f:
        f.writelines(pairs(random.Random(2), args.pairs // 20))
    subprocess.run([BIN / "kto-convert", "-q", data, "-o", records, "--manifest", "none"], check=True)
    subprocess.run([BIN / "kto-convert", "-q", data, "--order", "shuffle", "-o", shuffled, "--manifest", "none"], check=True)
    size = records.stat().st_size
    ours = [str(BIN / "kto-tokenize"), "-q", "--model", str(model), "--max-length", "4096", "--allow-special"]
    cores = os.cpu_count()
    many = f"datasets.map, {cores} processes"
    sides = {
        "kto-tokenize": lambda: timed([*ours, str(records)], folder / "ours.kto.arrow"),
        "kto-tokenize, one thread": lambda: timed([*ours, "--threads", "1", str(records)], folder / "one.kto.arrow"),
        "kto-tokenize, shuffled": lambda: timed([*ours, str(shuffled)], folder / "shuffled.kto.arrow"),
        "datasets.map": lambda: peer("peer_tokenize.py", model, records, folder / "ours.kto.arrow", 1),
        many: lambda: peer("peer_tokenize.py", model, records, folder / "ours.kto.arrow", cores),
    }
    results = rounds(sides, args.rounds, slow=("datasets.map", many))
    assert (folder / "ours.kto.arrow").read_bytes() == (folder / "one.kto.arrow").read_bytes(), "threads changed the bytes"
    for runs in results.values():
        assert all(r.get("different", 0) == 0 for r in runs), "the ids differ"
    return {"size": size, "rows": sum(1 for _ in open(records)), "sides": summary(results, size)}


def memory(args, folder):
    """A block of rows over and over, through a pipe: what is kept of a row would show."""
    rng = random.Random(3)
    block = "".join(pairs(rng, 4000)).encode()
    times = int(args.gigabytes * 1e9) // len(block)
    out = {}
    for name, flags in [("default", []), ("without the duplicate check", ["--no-duplicate-check"])]:
        def feed(stream):
            for _ in range(times):
                stream.write(block)

        done = timed([str(BIN / "kto-convert"), "-q", *flags], os.devnull, feed)
        out[name] = {"peak": done["peak"], "seconds": done["seconds"], "bytes": times * len(block)}
        print(f"  {name}: {done['peak'] / 2**20:.0f} MiB, {times * len(block) / 1e6 / done['seconds']:.0f} MB/s", flush=True)
    return {"runs": out}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=[])
    parser.add_argument("--out", default=str(machine.ROOT / "bench" / "runs"))
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=160_000)
    parser.add_argument("--gigabytes", type=float, default=10)
    args = parser.parse_args()
    for case in args.cases or ["convert", "tokenize", "memory"]:
        print(case, flush=True)
        about = {"case": f"data-{case}", "date": args.date, "revision": machine.revision(), "machine": machine.describe()}
        with tempfile.TemporaryDirectory() as folder:
            result = {**about, **globals()[case](args, Path(folder))}
        path = Path(args.out) / f"{args.date}-data-{case}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        for name, side in result.get("sides", {}).items():
            print(f"{name}: {side['median_seconds']:.2f} s, {side['mb_per_second']:.1f} MB/s, {side['peak'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
