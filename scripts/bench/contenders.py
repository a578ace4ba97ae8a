"""The two programs as processes that are let run one step at a time.

A contender that is not at its step is stopped (SIGSTOP), so only one of them uses the cores. Ours has no notion of a
driver: its step is over when the next line of timing.jsonl is there, and is then stopped; whatever it did before the
signal arrived counts for its next step. The times in that file are not used, because they contain the pauses. The peer
waits for a line on its standard input.
"""
import json
import os
import signal
import subprocess
import time
from pathlib import Path

POLL = 0.001
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def busy_seconds():
    """CPU time that all processes of the machine have used."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / TICKS


def anonymous_bytes(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


class Process:
    """A child that can be paused; knows how long it has been running."""

    def __init__(self, command, log, env=None, **pipes):
        self.log = open(log, "w")
        self.child = subprocess.Popen(command, env={**os.environ, **(env or {})}, stderr=self.log, text=True, **pipes)
        self.running, self.resumed, self.peak, self.peak_anonymous = 0.0, time.perf_counter(), 0, 0

    def pause(self):
        # Not Popen.send_signal, which would collect an ended child and lose its peak memory.
        os.kill(self.child.pid, signal.SIGSTOP)
        self.running += time.perf_counter() - self.resumed
        self.resumed = None

    def resume(self):
        self.resumed = time.perf_counter()
        os.kill(self.child.pid, signal.SIGCONT)

    def clock(self):
        """Seconds that the child has been let run."""
        return self.running + (time.perf_counter() - self.resumed if self.resumed else 0.0)

    def watch(self):
        """Notes the memory in use; fails if the child has ended."""
        pid, status, usage = os.wait4(self.child.pid, os.WNOHANG)
        if pid:
            self.ended(status, usage)
            return False
        self.peak_anonymous = max(self.peak_anonymous, anonymous_bytes(self.child.pid))
        return True

    def ended(self, status, usage):
        self.running = self.clock()
        self.resumed = None
        self.peak = usage.ru_maxrss * 1024
        self.child.returncode = os.waitstatus_to_exitcode(status)
        if self.child.returncode:
            raise SystemExit(f"{self.child.args[0]} ended with {self.child.returncode}; see {self.log.name}")

    def finish(self):
        """Lets the child run to its end."""
        if self.child.returncode is None:
            if self.resumed is None:
                self.resume()
            _, status, usage = os.wait4(self.child.pid, 0)
            self.ended(status, usage)

    def kill(self):
        if self.child.returncode is None:
            self.child.kill()
            self.child.wait()


def with_others(turn):
    """Adds to a turn's record what other processes used of the cores meanwhile: a disturbed step shows."""

    def measured(self):
        began = busy_seconds()
        record = turn(self)
        others = busy_seconds() - began - (record["cpu_seconds"] or 0)
        return {**record, "other_cpu_seconds": round(max(0.0, others), 2)}

    return measured


class Ours:
    """kto-train. Its run directory must not exist."""

    name = "kto-train"

    def __init__(self, command, out, log):
        self.out, self.steps = Path(out), 0
        self.process = Process([*command, "--out", str(out), "-q"], log, stdout=subprocess.DEVNULL)

    def wait_for(self, ready):
        """Waits until `ready()`; the memory is looked at twenty times a second. False if the child ended before."""
        polls = 0
        while not ready():
            if polls % 50 == 0 and not self.process.watch():
                return ready()
            polls += 1
            time.sleep(POLL)
        return True

    def timing(self):
        """The lines of timing.jsonl: line 0 is the reference pass, line n is step n."""
        try:
            text = (self.out / "timing.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def metrics(self, step):
        return json.loads((self.out / "metrics.jsonl").read_text().splitlines()[step - 1])

    def prepare(self):
        """Loads the model, scores the references, and stops there; returns the seconds."""
        self.wait_for(lambda: len(self.timing()) > 0)
        self.mark = self.process.clock()
        if self.process.child.returncode is None:
            self.cpu = cpu_seconds(self.process.child.pid)
            self.process.pause()
        return self.mark

    def next_step(self):
        """Waits for the end of a step; returns (seconds, CPU seconds) since the end of the one before."""
        self.steps += 1
        if not self.wait_for(lambda: len(self.timing()) > self.steps):
            raise SystemExit(f"kto-train ended before step {self.steps}; see {self.process.log.name}")
        now, alive = self.process.clock(), self.process.child.returncode is None
        seconds, self.mark = now - self.mark, now
        cpu = cpu_seconds(self.process.child.pid) if alive else None
        used, self.cpu = (cpu - self.cpu if alive else None), cpu
        return seconds, used

    @with_others
    def turn(self):
        self.process.resume()
        seconds, cpu = self.next_step()
        if self.process.child.returncode is None:
            self.process.pause()
        line = self.metrics(self.steps)
        return {"seconds": seconds, "cpu_seconds": cpu, "loss": line["loss"], "kl": line.get("kl")}


class Peer:
    """peer_trl.py."""

    name = "TRL"

    def __init__(self, command, log, env):
        self.process = Process(command, log, env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.done = None

    def event(self, *expected):
        line = self.process.child.stdout.readline()
        if not line:
            self.process.finish()
            raise SystemExit(f"the peer ended early; see {self.process.log.name}")
        event = json.loads(line)
        assert event["event"] in expected, event
        return event

    def prepare(self):
        """Loads the model, with --precompute scores the references, and stops there; returns the seconds."""
        self.event("ready")
        self.process.pause()
        return self.process.clock()

    @with_others
    def turn(self):
        self.process.resume()
        cpu, began = cpu_seconds(self.process.child.pid), time.perf_counter()
        self.process.child.stdin.write("go\n")
        self.process.child.stdin.flush()
        event = self.event("step")
        seconds = time.perf_counter() - began
        cpu = cpu_seconds(self.process.child.pid) - cpu
        # What lies between its steps (logging, collating the next batch) is left out of the peer's time.
        follows = self.event("ready", "done")
        if follows["event"] == "done":
            self.done = follows
        # After its last step too: its end must not run beside the other's last step.
        self.process.pause()
        return {"seconds": seconds, "cpu_seconds": cpu, "loss": event["loss"], "tokens": event["tokens"],
                "own_seconds": event["seconds"]}
