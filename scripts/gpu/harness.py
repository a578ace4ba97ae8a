"""What every phase of gpu-check uses: processes with time limits, memory of the device over time, runs of kto-train, results on disk."""
import glob
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

MIB, GIB = 2**20, 2**30


class Fault(Exception):
    """Something that a phase records and goes on after."""


class Session:
    """The machine, the bundle, the folders of results and of what is made on the way."""

    def __init__(self, bundle, out, work, rehearse, python):
        self.bundle, self.out, self.work, self.rehearse, self.python = bundle, out, work, rehearse, python
        self.train, self.checks = bundle / "bin/kto-train", bundle / "bin/kernel-checks"
        self.device = "cpu" if rehearse else "cuda"
        self.env = {**os.environ, "LD_LIBRARY_PATH": libraries(bundle, python)}
        self.limit = None
        self.results = {}

    def left(self, most):
        """Seconds for a command: at most so many, and no more than the phase has left."""
        left = most if self.limit is None else min(most, self.limit - time.monotonic())
        if left <= 0:
            raise Fault("the phase's time is over")
        return left

    def run(self, command, seconds, ok=(0,)):
        """Runs a command to its end. Returns (exit code, what it said)."""
        command = [str(c) for c in command]
        try:
            done = subprocess.run(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=self.left(seconds))
        except subprocess.TimeoutExpired as e:
            said = (e.stdout or b"").decode(errors="replace") if isinstance(e.stdout, bytes) else e.stdout or ""
            raise Fault(f"{Path(command[0]).name} took more than {seconds:.0f} s: {said[-300:]}")
        if ok is not None and done.returncode not in ok:
            raise Fault(f"{Path(command[0]).name} ended with {done.returncode}: {done.stdout.strip()[-400:]}")
        return done.returncode, done.stdout

    def phase(self, name, seconds, work):
        """Does one phase; what goes wrong is recorded. `work(record)` fills the record as it gets on."""
        record = {"ok": False}
        self.results[name] = record
        began, self.limit = time.monotonic(), time.monotonic() + seconds
        print(f"== {name}", flush=True)
        try:
            work(record)
            record["ok"] = not record.get("wrong")
        except Fault as e:
            record["wrong"] = [*record.get("wrong", []), str(e)]
        except Exception as e:  # A defect of the script must not end the other phases.
            record["wrong"] = [*record.get("wrong", []), f"{type(e).__name__}: {e}"]
        record["seconds"] = round(time.monotonic() - began, 1)
        self.limit = None
        for line in record.get("wrong", []):
            print(f"   WRONG {line}", flush=True)
        print(f"   {'ok' if record['ok'] else 'NOT ok'}, {record['seconds']} s", flush=True)


def libraries(bundle, python):
    """LD_LIBRARY_PATH with cuBLAS: what is set, the bundle's lib, and the folders of NVIDIA's wheels."""
    folders = [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p] + [str(bundle / "lib")]
    ask = [python, "-c", "import sys; print('\\n'.join(sys.path))"]
    paths = subprocess.run(ask, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    for path in filter(None, paths):
        folders += sorted({str(Path(f).parent) for f in glob.glob(f"{path}/nvidia/*/lib/libcublas.so*")})
    return ":".join(folders)


def importable(session, *modules):
    """Returns the modules that the peers' Python lacks."""
    ask = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    return subprocess.run([session.python, "-c", ask, *modules], stdout=subprocess.PIPE, text=True).stdout.split()


class Watch(threading.Thread):
    """Samples the device's memory in use, as nvidia-smi says it, five times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.tool, self.peak, self.over = shutil.which("nvidia-smi"), 0, threading.Event()
        self.start_bytes = self.sample()
        self.start()

    def sample(self):
        if not self.tool:
            return 0
        ask = [self.tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        said = subprocess.run(ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.split()
        return int(said[0]) * MIB if said and said[0].isdigit() else 0

    def run(self):
        while self.tool and not self.over.wait(0.2):
            self.peak = max(self.peak, self.sample())

    def stop(self):
        """Returns the most that was in use beyond what was before; nothing without nvidia-smi."""
        self.over.set()
        self.join()
        return max(0, self.peak - self.start_bytes) if self.tool else None


def jsonl(path):
    """The whole lines of a file that may be growing, or not there yet."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Run:
    """A run of kto-train in a fresh directory, watched from outside."""

    def __init__(self, session, name, model, data, options, fresh=True):
        self.session, self.out, self.log = session, session.work / name, session.work / f"{name}.log"
        if fresh:
            shutil.rmtree(self.out, ignore_errors=True)
        self.command = [str(c) for c in [session.train, "-q", "--model", model, "--data", data, "--out", self.out, *options]]
        self.child, self.watch, self.smi_peak = None, None, None

    def start(self):
        self.watch = Watch()
        self.child = subprocess.Popen(self.command, env=self.session.env, stdout=subprocess.DEVNULL, stderr=open(self.log, "w"))
        return self

    def steps(self):
        """Lines of timing.jsonl of steps, without that of the reference pass."""
        return [line for line in jsonl(self.out / "timing.jsonl") if line["step"] > 0]

    def wait(self, seconds, steps=None, kill=signal.SIGKILL):
        """Waits for the end, or until there are so many steps, and then ends it. Returns the exit code."""
        limit = time.monotonic() + self.session.left(seconds)
        while self.child.poll() is None:
            if steps is not None and len(self.steps()) >= steps:
                self.child.send_signal(kill)
                self.child.wait()
                break
            if time.monotonic() > limit:
                self.child.kill()
                self.child.wait()
                self.smi_peak = self.watch.stop()
                raise Fault(f"{self.out.name}: more than {seconds:.0f} s, {len(self.steps())} steps done")
            time.sleep(0.005)
        self.smi_peak = self.watch.stop()
        return self.child.returncode

    def finish(self, seconds):
        """Runs it to its end; anything but 0 is a fault."""
        code = self.start().wait(seconds)
        if code:
            raise Fault(f"{self.out.name} ended with {code}: {self.said()}")
        return self

    def said(self):
        return self.log.read_text().strip()[-400:]

    def device_peak(self):
        """What kto-train counts at most of the device's memory; of a rehearsal its resident set."""
        key = "peak_memory" if self.session.rehearse else "peak_device_memory"
        return max((line.get(key, 0) for line in jsonl(self.out / "timing.jsonl")), default=0)

    def metrics(self):
        return jsonl(self.out / "metrics.jsonl")

    def bits(self):
        """Hashes of everything that must not depend on interruptions."""
        return {"adapter": sha256(self.out / "adapter/adapter_model.safetensors"), "metrics": sha256(self.out / "metrics.jsonl")}


def say(text):
    print(f"   {text}", flush=True)


def rate(numbers):
    """The median; nothing of nothing."""
    numbers = sorted(numbers)
    return numbers[len(numbers) // 2] if numbers else None


def device_options(session, dtype):
    return ["--device", session.device] + ([] if session.rehearse else ["--dtype", dtype])


if __name__ == "__main__":
    sys.exit("harness.py is a part of gpu-check")
