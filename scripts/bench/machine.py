"""What a result says about the machine: enough to compare results, nothing that names the machine."""
import json
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def describe():
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": fields.get("model name", platform.machine()), "cores": os.cpu_count(), "kernel": platform.release(),
        "memory_gib": round(memory / 2**30, 1), "load_1min": os.getloadavg()[0],
        "simd": [f for f in ("avx2", "fma", "avx512f", "asimd") if f in flags],
    }


def revision():
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def version(python, package):
    """The version of a package that an interpreter has, or None."""
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    said = subprocess.run([python, "-c", code, package], capture_output=True, text=True)
    return said.stdout.strip() if said.returncode == 0 else None


def rates(threads):
    """Measured peaks: multiply-adds in registers, a large matrix product of ours, a copy (kernels/benches)."""
    cargo = os.environ.get("CARGO", "cargo")
    command = [cargo, "bench", "-q", "-p", "kto-kernels", "--bench", "kernels", "--", "--peaks", "--json", "--threads", str(threads)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def peaks(pid):
    """The largest resident set of a process so far and its anonymous part now, in bytes; zeros when it is gone."""
    found = {"VmHWM": 0, "RssAnon": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in found:
                found[key] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return found["VmHWM"], found["RssAnon"]
