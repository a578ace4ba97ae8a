"""Makes target/cuda/gpu-check: everything that a GPU machine without Rust needs, under 64 MB."""
import json
import os
import shutil
import subprocess
from pathlib import Path

from harness import Fault

ROOT = Path(__file__).resolve().parents[2]
MOST = 64 * 10**6
SCRIPTS = ["gpu-check", "gpu/*.py", "bench/contenders.py", "bench/decoder.py", "bench/nf4.py", "bench/operations.py", "bench/safetensors_file.py",
           "bench/shapes.py", "bench/workload.py"]


def cargo(*arguments):
    """Runs cargo with the private nvcc; returns the executables that it made."""
    command = [os.environ.get("CARGO", "cargo"), *arguments, "--message-format", "json-render-diagnostics"]
    toolkit = 'eval "$(scripts/cuda-toolkit build)" && exec "$@"'
    done = subprocess.run(["bash", "-c", toolkit, "bash", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Fault(f"cargo {arguments[0]} failed")
    made = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {m["target"]["name"]: Path(m["executable"]) for m in made if m.get("executable")}


def binaries(folder):
    """kto-train for GPUs as `make cuda` leaves it, the kernel checks, and the tools that prepare rows; stripped."""
    subprocess.run([os.environ.get("MAKE", "make"), "-s", "cuda"], cwd=ROOT, check=True)
    # The whole workspace, as `make build` does it: the same objects serve both.
    tools = cargo("build", "--release", "--workspace", "--bins")
    checks = cargo("test", "--release", "--no-run", "-p", "kto-kernel-checks", "--features", "cuda", "--test", "device")
    made = {"kto-train": ROOT / "target/cuda/kto-train", "kto-tokenize": tools["kto-tokenize"], "kernel-checks": checks["device"]}
    folder.mkdir(parents=True)
    for name, path in made.items():
        subprocess.run(["strip", "-o", folder / name, path], check=True)
    return tools["kto-convert"], tools["kto-tokenize"]


def golden(folder, convert, tokenize):
    """TRL's golden cases: settings, models, adapters, steps, and the rows as tokens."""
    data = ROOT / "testdata/trl"
    for meta_path in sorted(data.glob("*/meta.json")):
        meta, case = json.loads(meta_path.read_text()), folder / meta_path.parent.name
        case.mkdir(parents=True, exist_ok=True)
        shutil.copy(meta_path, case)
        for key in ("model", "adapter_init", "adapter_final", "steps"):
            source, target = data / meta["files"][key], folder / meta["files"][key]
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        records = subprocess.run([convert, "-q", "--order", "trl", data / meta["files"]["data"]], stdout=subprocess.PIPE, check=True).stdout
        command = [tokenize, "-q", "--model", data / meta["files"]["model"], "--max-length", str(meta["max_length"]), "-o", case / "tokens.kto.arrow"]
        subprocess.run(command, input=records, check=True)


def bundle(folder):
    shutil.rmtree(folder, ignore_errors=True)
    convert, tokenize = binaries(folder / "bin")
    golden(folder / "data/trl", convert, tokenize)
    for pattern in SCRIPTS:
        for source in sorted((ROOT / "scripts").glob(pattern)):
            target = folder / "scripts" / source.relative_to(ROOT / "scripts")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    revision = subprocess.run(describe, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.strip() or "unknown"
    (folder / "REVISION").write_text(revision + "\n")
    sizes = {p: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    for path in sorted(sizes, key=sizes.get, reverse=True)[:4]:
        print(f"{sizes[path] / 1e6:6.1f} MB  {path.relative_to(folder)}")
    total = sum(sizes.values())
    print(f"{total / 1e6:6.1f} MB  {folder}")
    if total > MOST:
        raise Fault(f"the bundle has {total / 1e6:.1f} MB, more than {MOST / 1e6:.0f}")
