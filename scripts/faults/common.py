"""What the fault tests share: the tools as processes, the library of fail_nth.c, a tiny model with rows, results."""
import argparse
import datetime
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import machine  # noqa: E402
import tiny_model  # noqa: E402

BIN = Path(os.environ.get("BIN", ROOT / "target" / "release"))
ENVIRONMENT = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "NO_COLOR": "1", "SOURCE_DATE_EPOCH": "1700000000"}
ALL = "open,reopen,write,fsync,rename,truncate,mkdir,unlink,chmod,link"
# No process has this number, so what carries it is stale.
NOBODY = 999999999


def options(about, rest=None, text=None, **numbers):
    """Parses --short, --save, --work, the options that `text` explains and whole numbers (--jobs, --seed and the given ones), which the
    environment may set in capitals. With `rest`, also returns the names that stand without a flag."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--short", action="store_true", help="the form for CI")
    parser.add_argument("--save", action="store_true", help="write the result under bench/runs")
    parser.add_argument("--work", type=Path, help="folder for the runs, default a new one in the temporary folder")
    for name, default in {"jobs": 2, "seed": 1, **numbers}.items():
        parser.add_argument(f"--{name}", type=int, default=os.environ.get(name.upper(), default))
    for name, help_ in (text or {}).items():
        parser.add_argument(f"--{name}", help=help_)
    if rest:
        parser.add_argument(rest, nargs="*")
    args = parser.parse_args()
    return (args, getattr(args, rest)) if rest else args


def tool(name):
    path = BIN / name
    if not path.exists():
        sys.exit(f"{path} is missing; run: make build")
    return str(path)


def start(command, extra=None, **keywords):
    """Starts a tool that has no standard input and no terminal."""
    keywords = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, **keywords}
    return subprocess.Popen([str(word) for word in command], env={**ENVIRONMENT, **(extra or {})}, **keywords)


def run(command, extra=None, **keywords):
    """Runs a tool to its end; returns its exit code and what it said."""
    process = start(command, extra, **keywords)
    said = process.communicate(timeout=300)[1]
    return process.returncode, said


def must(command, **keywords):
    code, said = run(command, **keywords)
    if code != 0:
        sys.exit(f"{' '.join(str(word) for word in command)}: exit {code}: {said}")
    return said


def build_library(work):
    """Compiles fail_nth.c. Returns the library, or nothing and says why where calls cannot be caught."""
    library = work / "fail_nth.so"
    compiler = os.environ.get("CC", "cc")
    source = ROOT / "scripts" / "faults" / "fail_nth.c"
    try:
        done = subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source], capture_output=True, text=True)
    except FileNotFoundError:
        print(f"SKIPPED: no C compiler ({compiler})")
        return None
    if done.returncode != 0:
        print(f"SKIPPED: fail_nth.c does not compile here: {done.stderr.strip().splitlines()[-1:]}")
        return None
    report = work / "probe"
    run(["/bin/mkdir", work / "probed"], fault(library, "mkdir", work, n=1, do=28, report=report))
    if not report.exists() or (work / "probed").exists():
        print("SKIPPED: this kernel does not let a process catch its own system calls (seccomp)")
        return None
    return library


def fault(library, classes, under, n=0, do=5, more="", report=None, log=None):
    """The environment in which the n-th call of the classes on paths under `under` fails; see fail_nth.c."""
    made = {"LD_PRELOAD": library, "FAIL_NTH_CLASSES": classes, "FAIL_NTH_UNDER": under, "FAIL_NTH_N": n, "FAIL_NTH_DO": do,
            "FAIL_NTH_MORE": more, "FAIL_NTH_REPORT": report, "FAIL_NTH_LOG": log}
    return {name: str(value) for name, value in made.items() if value is not None}


def read_log(path):
    """Yields the calls that FAIL_NTH_LOG recorded, as (call, result, offset, flags, path, other path, bytes)."""
    with open(path, "rb") as file:
        while line := file.readline():
            name, result, offset, size, flags, first, second = line.decode("utf-8", "surrogateescape")[:-1].split("\t")
            data = file.read(int(size))
            yield name, int(result), int(offset), int(flags), first, second, data


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(path):
    """Every file under a path with its SHA-256; nothing when there is none."""
    if path.is_file():
        return {"": sha256(path)}
    return {str(p.relative_to(path)): sha256(p) for p in sorted(path.rglob("*")) if p.is_file()}


def leftovers(folder):
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.endswith((".kto-tmp", ".partial"))]


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def parallel(jobs, work, items):
    """Calls `work` on every item, some at a time; the results in order."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(work, items))


def make_inputs(work, pairs, seed=1):
    """Writes the tiny model, `pairs` preference pairs as records and tokens, and a few held-out rows."""
    tiny_model.write(work / "model", random.Random(seed))
    data = ROOT / "testdata" / "demo"
    for source, name, count in (("preferences.jsonl", "pairs", pairs), ("heldout.jsonl", "heldout", 8)):
        lines = (data / source).read_text().splitlines(keepends=True)[:count]
        (work / f"{name}.jsonl").write_text("".join(lines))
        must([tool("kto-convert"), "-q", work / f"{name}.jsonl", "-o", work / f"{name}.records.jsonl"])
        must([tool("kto-tokenize"), "-q", "--model", work / "model", work / f"{name}.records.jsonl", "-o", work / f"{name}.kto.arrow"])


def train_help():
    return start([tool("kto-train"), "--help"], stdout=subprocess.PIPE).communicate()[0]


def evaluation(work, every):
    """Flags of an evaluation on held-out rows, where kto-train has it; where not, says so."""
    if "--eval-data" in train_help():
        return ["--eval-data", work / "heldout.kto.arrow", "--eval-every", every]
    print("NOTE: kto-train knows no --eval-data: runs without evaluation")
    return []


def one_line(said):
    """Whether a message is one line, perhaps with hints, and no panic."""
    lines = [line for line in said.splitlines() if not line.startswith("hint: ")]
    return len(lines) == 1 and lines[0].startswith("kto-") and "panicked" not in said


def save(name, record):
    """Writes a result to bench/runs and says where."""
    date = datetime.date.today().isoformat()
    record = {"case": name, "date": date, "revision": machine.revision(), "machine": machine.describe(), **record}
    path = ROOT / "bench" / "runs" / f"{date}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"saved as {path.relative_to(ROOT)}")
