"""Phase 4: what runs of real shapes hold of the device, against their --memory; the longest row; shapes that only fit by streaming."""
import re
import shutil
import threading

import models
import workloads
from harness import GIB, Fault, Run, device_options, rate, say

# name: shape, rows of a step, tokens of a prompt and of a completion, --memory, steps
CASES = {
    "8b-5GiB": ("llama3.1-8b", 1, 1024, 1024, "5GiB", 3),
    "mistral-7b-4.7GiB": ("mistral-7b", 1, 1024, 1024, "4812MiB", 3),
    "8b-2GiB": ("llama3.1-8b", 1, 1024, 1024, "2GiB", 2),
    "mistral-7b-2GiB": ("mistral-7b", 1, 1024, 1024, "2GiB", 2),
    "8b-8GiB": ("llama3.1-8b", 1, 1024, 1024, "8GiB", 3),
    "mistral-7b-8GiB": ("mistral-7b", 1, 1024, 1024, "8GiB", 3),
    "8b-16x512-4GiB": ("llama3.1-8b", 16, 384, 128, "4GiB", 3),
    "8b-16k-8GiB": ("llama3.1-8b", 1, 15360, 1024, "8GiB", 1),
    "8b-longest-8GiB": ("llama3.1-8b", 1, None, 1024, "8GiB", 1),
    "14b-8GiB": ("qwen2.5-14b", 1, 1024, 1024, "8GiB", 1),
    "32b-8GiB": ("qwen2.5-32b", 1, 1024, 1024, "8GiB", 1),
}
REHEARSAL = {
    "tiny-default": ("tiny-nf4", 2, 64, 32, None, 2),
    "tiny-least": ("tiny-nf4", 2, 64, 32, "least", 2),
    "tiny-longest": ("tiny-nf4", 1, None, 64, "40MiB", 1),
}
# In the order in which they are wanted.
SHAPES = ["mistral-7b", "llama3.1-8b", "qwen2.5-14b", "qwen2.5-32b"]
# A part of the disk that stays free.
SPARE = 4 * GIB


class Models(threading.Thread):
    """Writes the models one after the other while the other phases run."""

    def __init__(self, session):
        super().__init__(daemon=True)
        self.folder = session.work / "models"
        self.names = ["tiny-nf4"] if session.rehearse else SHAPES
        self.done = {name: threading.Event() for name in self.names}
        self.faults = {}
        self.start()

    def run(self):
        for name in self.names:
            try:
                self.write(name)
            except OSError as e:
                self.faults[name] = f"{name} could not be written: {e}"
            self.done[name].set()

    def write(self, name):
        directory, shape = self.folder / name, models.of(name)
        if (directory / "config.json").exists():
            return
        # A linear weight takes 0.52 bytes a parameter, embedding and head two.
        ends = shape.vocab * shape.hidden * (1 if shape.tied else 2)
        needed = int(0.53 * (shape.parameters() - ends)) + 2 * ends
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed + SPARE:
            self.faults[name] = f"{name} needs {needed / GIB:.0f} GiB of disk, {free / GIB:.0f} are free"
            return
        shutil.rmtree(directory, ignore_errors=True)
        models.write(directory, shape)

    def get(self, session, name):
        """Waits for a model."""
        if not self.done[name].wait(session.left(120)):
            raise Fault(f"{name} was not written in time")
        if name in self.faults:
            raise Fault(self.faults[name])
        return self.folder / name


def tokens_of(session, batch, prompt, completion):
    # Enough rows for the largest sweep of the reference pass, or what the time allows.
    count = max(4 * batch, 2, min(32, 65536 // (prompt + completion)))
    vocab = 512 if session.rehearse else workloads.VOCAB
    return workloads.tokens(session.bundle / "bin", session.work / "rows", f"{count}x{prompt}+{completion}", count, prompt, completion, vocab=vocab)


def options(session, batch, memory):
    limit = [] if memory is None else ["--memory", memory]
    return ["--force-base", "--batch", batch, "--lora-r", 16, "--lr", 1e-5, *limit, *device_options(session, "bf16")]


def dry_run(session, model, tokens, options):
    """Returns (exit code, output) of --dry-run."""
    command = [session.train, "-q", "--model", model, "--data", tokens, "--out", session.work / "none", *options, "--dry-run"]
    return session.run(command, 30, ok=(0, 71))


def least(session, model, tokens, options):
    """The least --memory that is accepted, as kto-train's refusal names it."""
    _, said = dry_run(session, model, tokens, [*options, "--memory", "1MiB"])
    return re.search(r"--memory (\S+) if", said)[1]


def longest(session, model, completion, memory):
    """The longest prompt whose plan fits, in steps of 1,024 tokens (of a rehearsal 64)."""
    grain, low, high = (64, 1, 64) if session.rehearse else (1024, 8, 128)
    while high - low > 1:
        middle = (low + high) // 2
        code, _ = dry_run(session, model, tokens_of(session, 1, middle * grain, completion), options(session, 1, memory))
        low, high = (middle, high) if code == 0 else (low, middle)
    return low * grain


def one(session, written, name, case):
    shape, batch, prompt, completion, memory, steps = case
    model = written.get(session, shape)
    if prompt is None:
        prompt = longest(session, model, completion, memory)
    tokens = tokens_of(session, batch, prompt, completion)
    if memory == "least":
        memory = least(session, model, tokens, options(session, batch, None))
    of = options(session, batch, memory)
    code, plan = dry_run(session, model, tokens, of)
    where = "memory" if session.rehearse else "GPU"
    find = lambda key: (re.search(rf"^{where}: {key} +(.*)$", plan, re.M) or [None, None])[1]
    found = {"shape": shape, "batch": batch, "tokens_of_a_row": prompt + completion, "memory": memory, "predicted": find("predicted peak"), "limit": find("limit"),
             "choice": (re.search(r"^memory: choice +(.*)$", plan, re.M) or [None, None])[1]}
    if code:
        return found | {"wrong": f"refused: {plan.strip()[-200:]}"}
    run = Run(session, f"memory-{name}", model, tokens, of).start()
    code = run.wait(90, steps=steps)
    lines = run.steps()
    found |= {"exit": code, "counted_bytes": run.device_peak(), "smi_bytes": run.smi_peak, "steps": [line["seconds"] for line in lines],
              "tokens_per_second": rate([line["tokens_per_second"] for line in lines]), "losses": [line["loss"] for line in run.metrics()]}
    if code not in (0, -9) or len(lines) < steps:
        found["wrong"] = f"ended with {code} after {len(lines)} steps: {run.said()}"
    shutil.rmtree(run.out, ignore_errors=True)
    return found


def limit_of(found):
    number, unit = found["limit"].split()[:2]
    return float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def memory(session, record, written):
    record["cases"], record["wrong"] = {}, []
    for name, case in (REHEARSAL if session.rehearse else CASES).items():
        try:
            found = one(session, written, name, case)
        except Fault as e:
            found = {"wrong": str(e)}
        record["cases"][name] = found
        # kto-train's own count is a hard limit on a GPU; a processor's resident set has its own check (scripts/check-memory).
        if not session.rehearse and found.get("counted_bytes", 0) > 1.001 * limit_of(found):
            found["wrong"] = f"{found['counted_bytes'] / GIB:.2f} GiB are over the limit"
        if "wrong" in found:
            record["wrong"].append(f"{name}: {found['wrong']}")
            continue
        smi = "" if found["smi_bytes"] is None else f", nvidia-smi {found['smi_bytes'] / GIB:.2f} GiB"
        say(f"{name}: rows of {found['tokens_of_a_row']:,}, predicted {found['predicted']}, held {found['counted_bytes'] / GIB:.2f} GiB{smi}, "
            f"{found['tokens_per_second']:.0f} tokens/s")
