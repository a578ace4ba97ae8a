"""Phase 5: tokens a second and share of the measured peak, ours and TRL + PEFT + bitsandbytes in turn, on the same rows and model."""
import json
import os
import statistics
import threading

import models
import operations
import workloads
from contenders import Ours, Peer
from harness import Fault, device_options, importable, say

PEER_MODULES = ["torch", "transformers", "peft", "trl", "bitsandbytes", "datasets"]
LR = "1e-5"
# name: rows of a step, tokens of a prompt and of a completion, sharing, the peer's options (its references are always precomputed)
CASES = {
    "paired": (8, 384, 128, "paired", []),
    "unshared": (8, 384, 128, "unshared", []),
    "paired-checkpointing": (8, 384, 128, "paired", ["--checkpointing"]),
}
REHEARSAL = {"paired": (4, 24, 8, "paired", []), "unshared": (4, 24, 8, "unshared", [])}
STEPS = 5


def summary(records, tokens, floor, peak):
    """The first step is a warm-up."""
    seconds = [r["seconds"] for r in records[1:]]
    median = statistics.median(seconds)
    found = {"steps": records, "median_seconds": median, "min_seconds": min(seconds), "max_seconds": max(seconds), "tokens_per_second": tokens / median}
    if peak:
        found["share_of_peak"] = floor / median / peak
    return found


def one(session, name, case, model, shape, peak, with_peer):
    batch, prompt, completion, sharing, peer_options = case
    folder = session.work / "rows"
    key = f"speed-{sharing}-{batch}x{prompt}+{completion}"
    records = workloads.rows(folder, key, batch * STEPS, prompt, completion, sharing, shape.vocab)
    tokens = workloads.tokens(session.bundle / "bin", folder, key, batch * STEPS, prompt, completion, sharing, shape.vocab)
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    # Every step has the same sizes.
    floor, of_step = operations.steps(shape, lines, batch)[0]["total"], batch * (prompt + completion)
    adapter, live = session.work / f"speed-{name}-adapter", []
    try:
        if with_peer:
            command = [session.python, session.bundle / "scripts/gpu/peer_trl.py", "--model", model, "--rows", records, "--adapter", adapter, "--batch", batch,
                       "--steps", STEPS, "--lr", LR, "--device", "cpu" if session.rehearse else "cuda", *peer_options]
            live.append(Peer([str(c) for c in command], session.work / f"speed-{name}-peer.log", {}))
            timer = end_at(session, live)
            live[0].prepare()
        out = session.work / f"speed-{name}"
        start = ["--init-adapter", adapter] if with_peer else ["--lora-r", 16, "--lora-alpha", 32]
        command = [session.train, "--model", model, "--data", tokens, "--force-base", "--preset", "trl", "--batch", batch, "--lr", LR, "--max-steps", STEPS,
                   *start, *device_options(session, "bf16")]
        live.insert(0, Ours([str(c) for c in command], out, session.work / f"speed-{name}.log"))
        if not with_peer:
            timer = end_at(session, live)
        live[0].prepare()
        results = [[] for _ in live]
        for step in range(STEPS):
            order = list(range(len(live)))
            for i in order if step % 2 == 0 else reversed(order):
                results[i].append(live[i].turn())
        for contender in live:
            contender.process.finish()
        timer.cancel()
    finally:
        for contender in live:
            contender.process.kill()
    timing = live[0].timing()
    found = {"batch": batch, "prompt": prompt, "completion": completion, "rows": sharing, "floor_operations": floor, "ours": summary(results[0], of_step, floor, peak),
             "ours_peak_device_bytes": max((line.get("peak_device_memory", 0) for line in timing), default=0)}
    if with_peer:
        found["peer"] = summary(results[1], of_step, floor, peak) | {"done": live[1].done, "options": peer_options}
        found["faster"] = found["peer"]["median_seconds"] / found["ours"]["median_seconds"]
        # Both in bf16, so the losses are only near.
        found["largest_difference_of_losses"] = max(abs(a["loss"] - b["loss"]) for a, b in zip(*results))
    return found


def last_words(session, case, with_peer):
    log = session.work / f"speed-{case}{'-peer' if with_peer else ''}.log"
    return log.read_text(errors="replace").strip()[-300:] if log.exists() else ""


def end_at(session, live):
    """Ends the processes when the phase's time is over; what waits for them then fails."""
    def end():
        for contender in list(live):
            contender.process.kill()
    timer = threading.Timer(session.left(150), end)
    timer.daemon = True
    timer.start()
    return timer


def speed(session, record, written):
    name = "tiny-nf4" if session.rehearse else "mistral-7b"
    missing = importable(session, *PEER_MODULES)
    if missing:
        say(f"SKIPPED the peer: {session.python} lacks {', '.join(missing)}")
    rates = session.results.get("kernels", {}).get("rates", {})
    peak = max((v for k, v in rates.items() if k.startswith("product") and "Bf16" in k), default=None)
    record.update(shape=name, peak_operations_per_second=peak, peer_missing=missing, cases={}, wrong=[])
    model, shape = written.get(session, name), models.of(name)
    os.environ["LD_LIBRARY_PATH"] = session.env["LD_LIBRARY_PATH"]
    for case, settings in (REHEARSAL if session.rehearse else CASES).items():
        if missing and settings[4]:
            continue
        found = None
        for with_peer in [True, False][bool(missing):]:
            try:
                found = one(session, case, settings, model, shape, peak, with_peer)
                break
            except (Fault, SystemExit, OSError, AssertionError) as e:
                record["wrong"].append(f"{case}{' beside the peer' if with_peer else ''}: {e}: {last_words(session, case, with_peer)}")
        if found is None:
            continue
        record["cases"][case] = found
        ours, peer = found["ours"], found.get("peer")
        share = f", {100 * ours['share_of_peak']:.0f} % of the peak" if "share_of_peak" in ours else ""
        beside = f"; TRL {peer['tokens_per_second']:.0f} tokens/s: {found['faster']:.2f} times" if peer else ""
        say(f"{case}: {ours['tokens_per_second']:.0f} tokens/s{share}{beside}")
