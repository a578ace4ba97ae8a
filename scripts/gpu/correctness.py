"""Phases 0 to 3: the device's self-test, every kernel, TRL's golden runs, 50 steps in bf16, exact resume."""
import json
import re
import struct

import memory_check
import models
import workloads
from harness import Fault, Run, device_options, say

# Largest differences from TRL's float32 runs that are right. f32: sums in another order than the processor's, whose own differences
# are up to 9e-7 in a loss; AdamW turns the rounding of a gradient near zero into a part of its step of 2e-3. bf16: eight bits of mantissa
# move a log-probability of 200 by about 0.5, a reward by a tenth of that, and a loss by a quarter of this.
TOLERANCES = {
    "f32": {"loss": 1e-5, "kl": 1e-3, "grad_norm": 1e-4, "adapter": 2e-4},
    "bf16": {"loss": 5e-2, "kl": 2.0, "grad_norm": 0.3, "adapter": 3e-2},
}
# Of 50 steps' losses: the mean difference, and the largest one.
NOISE = {"mean": 2e-2, "largest": 1e-1}


def check_device(session, record):
    code, said = session.run([session.train, "--check-device"], 60, ok=None)
    record.update(exit=code, said=said.strip())
    say(said.strip())
    if session.rehearse:
        if code != 69 or len(said.strip().splitlines()) > 2:
            raise Fault(f"without a GPU --check-device should be one line and its hint, and 69; it is {code}: {said}")
    elif code:
        raise Fault(f"--check-device ended with {code}")


def kernels(session, record):
    if session.rehearse:
        _, said = session.run([session.checks, "--list"], 30)
        record["tests"] = re.findall(r"(\w+): test", said)
        if len(record["tests"]) != 3:
            raise Fault(f"the kernel checks have other tests: {said}")
        return
    code, said = session.run([session.checks, "--nocapture", "--test-threads", "1"], 120, ok=None)
    (session.out / "kernels.txt").write_text(said)
    record["checks"] = dict(re.findall(r"^(\w+): (ok|WRONG) in", said, re.M))
    record["wrong"] = [line.strip() for line in said.splitlines() if re.search(r"panicked|expected|WRONG", line)][:20] if code else []
    say(", ".join(f"{name} {result}" for name, result in record["checks"].items()))
    _, said = session.run([session.checks, "--ignored", "--nocapture", "rates"], 60)
    record["rates"] = {name: float(value) for value, name in re.findall(r"^rate (\S+) (.*)$", said, re.M)}
    for name, value in record["rates"].items():
        say(f"{name}: {value / 1e12:.1f} TFLOP/s" if "product" in name else f"{name}: {value / 1e9:.1f} GB/s")


def golden_options(meta, data):
    """The flags of a golden case, as scripts/check-trl has them."""
    return [
        "--preset", "trl", "--init-adapter", data / meta["files"]["adapter_init"], "--reference", meta["ref"].replace("_", "-"), "--loss", meta["loss"],
        "--beta", meta["beta"], "--desirable-weight", meta["dw"], "--undesirable-weight", meta["uw"], "--lr", meta["lr"], "--schedule", meta["sched"],
        "--warmup-steps", meta["warmup"], "--weight-decay", meta["wd"], "--max-grad-norm", meta["clip"], "--batch", meta["bs"] * meta["ga"],
        "--micro-batch", meta["bs"]]


def tensors(path):
    """{name: values} of a float32 safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, t in header.items():
        low, high = t["data_offsets"]
        found[name] = struct.unpack(f"<{(high - low) // 4}f", data[8 + size + low:8 + size + high])
    return found


def largest(pairs):
    return max((abs(a - b) for a, b in pairs), default=0.0)


def compare(run, data, meta):
    """Largest differences of a run from TRL's: absolute, of the gradient's norm relative."""
    ours = run.metrics()
    trl = [json.loads(line) for line in (data / meta["files"]["steps"]).read_text().splitlines()]
    if len(ours) != len(trl):
        raise Fault(f"{run.out.name}: {len(ours)} steps, TRL has {len(trl)}")
    both = lambda key: [(a[key], b[key]) for a, b in zip(ours, trl) if b.get(key) is not None]
    mine, theirs = (tensors(d / "adapter_model.safetensors") for d in (run.out / "adapter", data / meta["files"]["adapter_final"]))
    if mine.keys() != theirs.keys():
        raise Fault(f"{run.out.name}: other tensors than TRL's adapter")
    return {
        "loss": largest(both("loss")), "kl": largest(both("kl")), "grad_norm": max(abs(a / b - 1) for a, b in both("grad_norm")),
        "adapter": max(largest(zip(mine[name], theirs[name])) for name in theirs),
    }


def golden(session, record):
    data = session.bundle / "data/trl"
    record["tolerances"], record["cases"], record["wrong"] = TOLERANCES, {}, []
    for dtype in ["f32"] if session.rehearse else ["f32", "bf16"]:
        for folder in sorted(p.parent for p in data.glob("*/meta.json")):
            name, meta = folder.name, json.loads((folder / "meta.json").read_text())
            options = [*golden_options(meta, data), "--epochs", meta["epochs"], *device_options(session, dtype)]
            run = Run(session, f"golden-{name}-{dtype}", data / meta["files"]["model"], folder / "tokens.kto.arrow", options)
            try:
                found = compare(run.finish(30), data, meta)
            except Fault as e:
                record["wrong"].append(str(e))
                continue
            record["cases"][f"{name} {dtype}"] = found
            for key, value in found.items():
                if not value <= TOLERANCES[dtype][key]:
                    record["wrong"].append(f"{name} {dtype}: {key} differs by {value:.2e}, allowed {TOLERANCES[dtype][key]:.0e}")
        of = [found for key, found in record["cases"].items() if key.endswith(dtype)]
        if of:
            say(f"{dtype}: largest differences " + ", ".join(f"{key} {max(f[key] for f in of):.1e}" for key in TOLERANCES[dtype]))


def noise(session, record):
    """50 steps of one golden case on the processor in f32, and on the device in both types."""
    data = session.bundle / "data/trl"
    meta = json.loads((data / "llama/meta.json").read_text()) | {"sched": "constant", "lr": 5e-4}
    def losses(name, where):
        options = [*golden_options(meta, data), "--epochs", 10, *where]
        run = Run(session, f"noise-{name}", data / meta["files"]["model"], data / "llama/tokens.kto.arrow", options)
        return [line["loss"] for line in run.finish(60).metrics()]
    record["wrong"], record["cpu"] = [], losses("cpu", ["--device", "cpu"])
    for dtype in ["f32"] if session.rehearse else ["f32", "bf16"]:
        found = losses(dtype, device_options(session, dtype))
        differences = [abs(a - b) for a, b in zip(found, record["cpu"])]
        mean, most = sum(differences) / len(differences), max(differences)
        record[dtype] = {"losses": found, "mean": mean, "largest": most}
        say(f"{len(found)} steps, {dtype} against f32 on the processor: mean {mean:.1e}, largest {most:.1e}")
        if len(found) < 50 or not (mean <= NOISE["mean"] and most <= NOISE["largest"]):
            record["wrong"].append(f"{dtype}: mean {mean:.1e} or largest {most:.1e} of {len(found)} steps beyond {NOISE}")


def resume(session, record):
    """Two equal runs, and runs that are killed and resumed, give the same bits; resident and streamed."""
    shape = "tiny-nf4" if session.rehearse else "smollm2-135m"
    model = session.work / f"resume-{shape}"
    if not (model / "config.json").exists():
        models.write(model, models.of(shape))
    vocab = models.of(shape).vocab
    tokens = workloads.tokens(session.bundle / "bin", session.work, f"resume-{shape}", 48, 160, 64, "paired", vocab)
    common = ["--force-base", "--batch", 4, "--epochs", 2, "--lr", 1e-3, "--lora-dropout", 0.1, *device_options(session, "bf16")]
    record["wrong"] = []
    # The smallest plan streams the weights.
    least = memory_check.least(session, model, tokens, common)
    for name, memory in [("resident", []), ("streamed", ["--memory", least])]:
        options = [*common, *memory, "--checkpoint-every", 3]
        first = Run(session, f"resume-{name}-1", model, tokens, options).finish(60).bits()
        second = Run(session, f"resume-{name}-2", model, tokens, options).finish(60).bits()
        kills = []
        for at in (4, 11):
            run = Run(session, f"resume-{name}-kill{at}", model, tokens, options).start()
            code = run.wait(60, steps=at)
            kills.append({"at": at, "killed": code == -9, "steps": len(run.metrics())})
            again = Run(session, run.out.name, model, tokens, [*options, "--resume"], fresh=False).finish(60)
            kills[-1]["equal"] = again.bits() == first
        record[name] = {"equal_runs": first == second, "kills": kills, "bits": first}
        say(f"{name}: equal runs {first == second}; " + ", ".join(f"killed after {k['steps']} steps: {'equal' if k['equal'] else 'DIFFERENT'}" for k in kills))
        if first != second:
            record["wrong"].append(f"{name}: two equal runs differ")
        record["wrong"] += [f"{name}: another result after a kill at step {k['steps']}" for k in kills if not k["equal"]]
        if not any(k["killed"] for k in kills):
            record["wrong"].append(f"{name}: no run was killed in time")
