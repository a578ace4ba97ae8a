#!/usr/bin/env python3
"""Runs every check of kto-quantize and kto-merge against their peers in turn, and keeps what they said.

usage: weight_peers.py [--save] [SCRIPT=PYTHON...]

bnb_peers.py, mlx_peers.py, gguf_peers.py, gguf_families.py and merge_peers.py, each with its own interpreter or else with this one.
--save writes bench/runs/DATE-weight-peers.json: the lines of each, and the versions. Ends with 1 when something does not hold.
"""
import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "bench"))
import machine  # noqa: E402

SCRIPTS = ("bnb_peers.py", "mlx_peers.py", "gguf_peers.py", "gguf_families.py", "merge_peers.py")
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "mlx", "mlx-lm", "gguf", "llama-cpp-python")


def check(script, python):
    """Runs a script, passing on what it prints; its lines by what they begin with. One that stops early counts as wrong."""
    held, wrong = [], []
    with subprocess.Popen([python, HERE / script], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            for mark, to in (("ok", held), ("FAIL", wrong)):
                if line.startswith(mark + " "):
                    to.append(line.removeprefix(mark).strip())
    if process.returncode != 0 and not wrong or not held:
        wrong.append(f"ended with {process.returncode} after {len(held)} checks")
    return {"script": f"scripts/oracle/{script}", "held": held, "wrong": wrong}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("pythons", nargs="*", metavar="SCRIPT=PYTHON")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    given = dict(text.split("=", 1) for text in args.pythons)
    if unknown := set(given) - set(SCRIPTS):
        parser.error(f"no such script: {', '.join(sorted(unknown))}")
    pythons = {script: given.get(script, sys.executable) for script in SCRIPTS}
    results = [check(script, python) for script, python in pythons.items()]
    for result in results:
        print(f"{result['script']}: {len(result['held'])} held, {len(result['wrong'])} did not")
    if args.save:
        date = datetime.date.today().isoformat()
        found = lambda package: next(filter(None, (machine.version(p, package) for p in pythons.values())), None)  # noqa: E731
        versions = {package: found(package) for package in PACKAGES}
        saved = {"case": "weight-peers", "date": date, "revision": machine.revision(), "versions": versions, "results": results}
        (ROOT / f"bench/runs/{date}-weight-peers.json").write_text(json.dumps(saved, indent=1) + "\n")
    return any(result["wrong"] for result in results)


sys.exit(main())
