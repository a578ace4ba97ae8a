#!/usr/bin/env python3
"""The kill test in a small form against other trainers: killed at drawn times, resumed as they offer it.

usage: peers.py [--runs N] [--seed N] [--save] trl|mlx ...       (TRL_PYTHON, MLX_PYTHON: their interpreters)

The model and the settings are those of scripts/kill-test (rank 64, dropout 0.1, cosine schedule, 60 steps, a checkpoint each
step; a batch of 4). Each peer first runs twice undisturbed: only a trainer that repeats itself can be compared. Then every run is killed
once by SIGKILL at a time drawn uniformly from its training time and resumed. Prints how many ended with the same adapter
and the largest difference of a step's loss.
"""
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.dont_write_bytecode = True
import common

HERE = Path(__file__).resolve().parent
PEERS = {"trl": ("trl_run.py", "TRL_PYTHON"), "mlx": ("mlx_run.py", "MLX_PYTHON")}


class Peer:
    """A trainer of others, run by a script of this folder."""

    def __init__(self, name, work, rows):
        script, variable = PEERS[name]
        self.name, self.work = name, work
        python = os.environ.get(variable, sys.executable)
        self.command = [python, HERE / script, "--model", work / "model", "--rows", rows]
        self.versions, self.reference, self.seconds = None, None, None

    def run(self, out, resume=False, kill_after=None):
        """Runs to the end, or kills `kill_after` seconds after the first step. Returns steps done, seconds, exit code, last words."""
        command = [*self.command, "--out", out, *(["--resume"] if resume else [])]
        said = open(out.with_suffix(".log"), "a")
        process = common.start(command, {"HOME": str(self.work)}, stdout=subprocess.PIPE, stderr=said)
        steps, begun, last = 0, None, None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "done":
                self.versions = event["versions"]
                break
            steps, begun, last = event["step"], begun or time.monotonic(), time.monotonic()
            if kill_after is not None and not resume and steps == 1:
                time.sleep(kill_after)
                process.kill()
                break
        code = process.wait()
        process.stdout.close()
        said.close()
        words = "".join(out.with_suffix(".log").read_text().strip().splitlines()[-1:]).replace(f"{self.work}/", "")
        return steps, (last - begun if last else 0.0), code, words

    def result(self, out):
        """The final adapter's hash and the loss of each step."""
        final = common.tree(out / "final")
        weights = {name: value for name, value in final.items() if name.endswith(".safetensors")}
        return weights, {int(s): x for s, x in json.loads((out / "losses.json").read_text()).items()}

    def undisturbed(self):
        """Runs twice; returns whether the results are equal."""
        results = []
        for name in ("first", "second"):
            out = self.work / f"{self.name}-{name}"
            _, self.seconds, code, words = self.run(out)
            if code != 0:
                sys.exit(f"{self.name}: exit {code}: {words}")
            results.append(self.result(out))
        self.reference = results[0]
        return results[0] == results[1]

    def disturbed(self, index, numbers):
        out = self.work / f"{self.name}-killed-{index}"
        delay = numbers.uniform(0, self.seconds)
        self.run(out, kill_after=delay)
        steps, _, code, words = self.run(out, resume=True)
        made = {"kill_after": delay, "resumed": code == 0}
        if code != 0:
            return made | {"error": words, "identical": False}
        weights, losses = self.result(out)
        difference = max(abs(x - losses[s]) for s, x in self.reference[1].items() if s in losses)
        missing = len(self.reference[1].keys() - losses.keys())
        return made | {"identical": weights == self.reference[0], "loss_difference": difference, "steps_missing": missing}


def test(name, args, work, rows):
    """Runs one peer; returns what happened and a line about it."""
    peer = Peer(name, work, rows)
    repeats = peer.undisturbed()
    runs = []
    for index in range(args.runs):
        runs.append(peer.disturbed(index, random.Random(f"{args.seed} {name} {index}")))
        print(f"{name} {index}: {runs[-1]}", flush=True)
    same, resumed = sum(r["identical"] for r in runs), sum(r["resumed"] for r in runs)
    difference = max((r["loss_difference"] for r in runs if r["resumed"]), default=None)
    about = ", ".join(f"{k} {v}" for k, v in peer.versions.items() if k != "python")
    print(f"{about}: undisturbed runs {'equal' if repeats else 'differ'}; {same} of {len(runs)} identical after a kill, {resumed} resumed, "
          f"largest difference of a loss {difference}", flush=True)
    return {"peer": name, "versions": peer.versions, "repeats_itself": repeats, "identical": same, "resumed": resumed, "runs": runs,
            "largest_loss_difference": difference, "first_loss": peer.reference[1].get(1), "training_seconds": peer.seconds}


def main():
    args, names = common.options(__doc__.splitlines()[0], rest="peers", runs=6, pairs=48)
    with tempfile.TemporaryDirectory(prefix="kto-peers-", dir=args.work) as folder:
        work = Path(folder)
        common.make_inputs(work, args.pairs)
        results = [test(name, args, work, work / "pairs.records.jsonl") for name in names or ["trl"]]
    if args.save:
        common.save("kill-peers", {"settings": {"runs": args.runs, "seed": args.seed, "pairs": args.pairs}, "results": results})


if __name__ == "__main__":
    main()
