#!/usr/bin/env python3
"""Writes the tables of BENCHMARKS.md, between its markers, and bench/growth.svg from the newest results in bench/runs.

usage: report.py [--runs DIR] [--file FILE]
"""
import argparse
import json
import statistics
from pathlib import Path

import plot
from machine import ROOT

BEGIN, END = "<!-- tables: begin (scripts/bench/report.py) -->", "<!-- tables: end -->"
# What was asked for: speed against the peer, and the peer's memory over ours.
AIMS = {"paired-default": (4.5, 4), "paired-precomputed": (2.9, 4), "small-memory": (3.5, 5), "unshared": (1.8, None)}
PEERS = {"paired-default": "TRL", "paired-precomputed": "TRL, references precomputed", "small-memory": "TRL, checkpointing",
         "unshared": "TRL, references precomputed"}
OURS = {"small-memory": "`--memory 900MiB`"}


def newest(runs):
    """The newest result of every case; names begin with the date."""
    found = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
    return {result["case"]: result for result in found}


def table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def spread(side):
    return f"{side['median_seconds']:.2f} ({side['min_seconds']:.2f}–{side['max_seconds']:.2f})"


def mib(size):
    return f"{size / 2**20:,.0f} MiB"


def rate(result, key="matmul_gflops"):
    """The measured rate: the better of before and after."""
    return max(r[key] for r in result["rates"])


def floor(result, steps):
    return statistics.median(f["total"] for f in result["floor_operations"][steps])


def about(results):
    any_ = next(r for case, r in results.items() if case in AIMS)
    m, v = any_["machine"], any_["versions"]
    packages = ", ".join(f"{k} {v[k]}" for k in ("trl", "peft", "transformers", "torch"))
    return (f"{m['cpu']}, {any_['settings']['threads']} threads of {m['cores']} cores ({', '.join(m['simd'])}), {m['memory_gib']:.0f} GiB, "
            f"Linux {m['kernel']}. {packages}, Python {v['python']}. Results of {any_['date']}, revision {any_['revision']}.\n")


def speed(results):
    head = ["case", "rows", "ours, s a step", "peer, s a step", "faster", "pairs of steps", "aim", "our peak", "peer's peak", "less memory", "aim"]
    rows, work = [], []
    for case in (c for c in AIMS if c in results):
        r = results[case]
        a, b = r["sides"]
        s, (aim, less) = r["speedup"], AIMS[case]
        rows.append([
            f"{OURS.get(case, 'default')} against {PEERS[case]}", r["settings"]["rows"], spread(a), spread(b), f"**{s['medians']:.2f}×**",
            f"{s['lowest']:.2f}–{s['highest']:.2f}", f"{aim}×", mib(a["peak_rss_bytes"]), mib(b["peak_rss_bytes"]),
            f"{r['memory_ratio']:.1f}×", f"{less}×" if less else "–"])
        counted = slice(1, None)
        tokens, least = statistics.median(r["tokens"][counted]), floor(r, counted)
        floor_seconds = least / rate(r) / 1e9
        work.append([
            f"{OURS.get(case, 'default')}, {r['settings']['rows']}", f"{tokens / a['median_seconds']:.0f}", f"{tokens / b['median_seconds']:.0f}",
            f"{least / 1e9:.0f}", f"{floor_seconds:.2f}", f"{100 * floor_seconds / a['median_seconds']:.0f} %",
            f"{rate(r):.0f} / {rate(r, 'multiply_add_gflops'):.0f} / {r['peer_matmul_gflops']:.0f}", f"{r['largest_loss_difference']:.1e}"])
    text = table(head, rows) + "\n"
    head = ["ours", "tokens/s", "peer's tokens/s", "least GFLOP a step", "floor, s", "share of the matrix-product rate reached",
            "GFLOP/s: our 1024³ product / multiply-adds in registers / torch's 1024³ product", "largest difference of losses"]
    return text + table(head, work)


def epoch(results):
    rows = []
    for case, what in (("paired-default", "TRL: its steps alone"), ("paired-precomputed", "TRL: precomputing and its steps")):
        if case not in results:
            continue
        a, b = results[case]["sides"]
        theirs = sum(s["seconds"] for s in b["steps"])
        if case == "paired-precomputed":
            theirs += results[case]["peer_init_seconds"][0]
        rows.append([what, str(len(b["steps"])), f"{a['total_seconds']:.1f}", f"{a['start_seconds']:.1f}", f"{theirs:.1f}",
                     f"**{theirs / a['total_seconds']:.2f}×**", "2.8×" if case == "paired-default" else "–"])
    head = ["against", "steps", "ours from start to end of the process, s", "of it loading and references", "peer, s", "faster", "aim"]
    return table(head, rows)


def allocator(results):
    rows = [[s["name"], spread(s), mib(s["peak_rss_bytes"])] for s in results["allocator"]["sides"]]
    return table(["peer", "s a step", "peak"], rows)


def growth(results):
    r = results["growth"]
    rows = []
    for p, t, m in zip(r["points"], r["time_fit"]["residuals"], r["memory_fit"]["residuals"]):
        least = statistics.median(p["floor_operations"][1:]) / rate(r) / 1e9
        rows.append([f"{p['tokens']:,}", f"{p['median_seconds']:.2f}", f"{p['tokens'] / p['median_seconds']:.0f}", f"{100 * t:+.1f} %",
                     f"{100 * least / p['median_seconds']:.0f} %", mib(p["peak_rss_bytes"]), f"{100 * m:+.1f} %"])
    a, b, c = r["time_fit"]["coefficients"]
    m, k = r["memory_fit"]["coefficients"]
    head = ["tokens of a row", "s a step", "tokens/s", "fit − measured", "share of the matrix-product rate", "peak", "fit − measured"]
    fits = (f"\nseconds = {a:.3f} + {1e3 * b:.3f}·10⁻³·n + {1e9 * c:.1f}·10⁻⁹·n², memory = {m / 2**20:.0f} MiB + {k / 1024:.1f} KiB·n.\n"
            "\n![seconds and memory over the length of a row](bench/growth.svg)\n")
    return table(head, rows) + fits


def large(results):
    rows = []
    for case in (c for c in ("nf4-7b", "nf4-14b") if c in results):
        r = results[case]
        s = r["settings"]
        seconds, tokens = [x["seconds"] for x in r["steps"]], [x["tokens"] for x in r["steps"]]
        least = statistics.median(r["floor_operations"]) / rate(r) / 1e9
        rows.append([
            f"{s['shape']} ({s['parameters'] / 1e9:.1f}·10⁹)", f"{s['batch']} × {s['prompt'] + s['completion']}, {s['rows']}", " ".join(s["ours"]) or "default",
            f"{statistics.median(seconds):.0f}", f"{sum(tokens) / sum(seconds):.1f}", f"{100 * least / statistics.median(seconds):.0f} %",
            f"{r['reference']['seconds']:.0f}", mib(r["weight_bytes"]), mib(r["peak_anonymous_bytes"]), mib(r["peak_rss_bytes"])])
    head = ["shape (parameters)", "rows", "plan", "s a step", "tokens/s", "share of the matrix-product rate", "references, s", "weights on disk",
            "peak, anonymous", "peak with mapped weights"]
    return table(head, rows)


def memory(results):
    rows = []
    for r in results["memory"]["results"]:
        plan = r["plan"]
        rows.append([
            r["shape"], r["dtype"], r["rows"], " ".join(r["options"]) or "default", str(plan["kept_layers"]), f"{plan['pack_rows']:,}",
            "streamed" if plan["stream"] else "resident", mib(r["predicted_bytes"]), mib(r["measured_bytes"]), f"{100 * r['difference']:+.1f} %"])
    head = ["shape", "weights", "rows a step, tokens", "limit", "blocks that keep activations", "rows of a pack", "weights are", "predicted peak",
            "measured peak", "predicted − measured"]
    return table(head, rows)


def kernels(results):
    rows, by_kernel = [], {}
    for x in results["kernels"]["rows"]:
        by_kernel.setdefault((x["kernel"], x["shape"]), []).append(x)
    for (kernel, shape), found in by_kernel.items():
        cells = [f"{x['rate']:.0f} {x['unit']}, {100 * x['floor_seconds'] / x['seconds']:.0f} %" for x in found]
        rows.append([f"`{kernel}`", shape, f"{1e3 * found[-1]['seconds']:.3f}", *cells])
    threads = [f"{n} thread{'s' * (n > 1)}" for n in sorted({x["threads"] for x in results["kernels"]["rows"]})]
    return table(["kernel", "shape", "ms", *(f"{t}: rate, share of the floor" for t in threads)], rows)


def data(results):
    """kto-convert and kto-tokenize beside their peers, and memory on a long stream."""
    parts = []
    for case, ours, what in [("data-convert", "kto-convert, text", "pairs of dialogues to records"),
                             ("data-tokenize", "kto-tokenize", "records to token ids")]:
        if case not in results:
            continue
        result = results[case]
        # A result of an older script has other names: its first side is ours.
        base = result["sides"].get(ours, next(iter(result["sides"].values())))["median_seconds"]
        def cpu(side):
            seconds = [run["cpu_seconds"] for run in side["runs"] if "cpu_seconds" in run]
            return f"{statistics.median(seconds):.2f}" if seconds else "–"

        rows = [[name, spread(side), cpu(side), f"{side['mb_per_second']:.1f}", f"{side['median_seconds'] / base:.1f}", mib(side["peak"])]
                for name, side in result["sides"].items()]
        about_ = f"{what}: {result['rows']:,} rows, {result['size'] / 1e6:.0f} MB; {result['machine']['cores']} cores, load before the run {result['machine']['load_1min']:.1f}; {result['date']}, revision {result['revision']}."
        moved = f" TRL moved text of a completion into the prompt in {result['records_moved_by_trl']:,} records." if case == "data-convert" else ""
        parts.append(f"{about_}{moved}\n\n" + table(["", "s", "CPU seconds", "MB/s", "times ours", "peak"], rows))
    if "data-memory" in results:
        result = results["data-memory"]
        rows = [[name, f"{run['bytes'] / 1e9:.1f} GB", mib(run["peak"]), f"{run['bytes'] / 1e6 / run['seconds']:.0f}"] for name, run in result["runs"].items()]
        parts.append("kto-convert on a generated stream through a pipe:\n\n" + table(["", "stream", "peak resident set", "MB/s"], rows))
    return "\n".join(parts)


def rewrite(results):
    """kto-quantize and kto-merge beside their peers."""
    r, rows = results["rewrite"], []
    for job, ours, theirs, aim in [("quantize", "kto-quantize, NF4 with double quantization", "transformers + bitsandbytes", "5×"),
                                   ("quantize-mlx", "kto-quantize, MLX's 4 bits in groups of 64", "mlx-lm on the CPU", "1×"),
                                   ("merge", "kto-merge, rank 16 on all linear layers", "PEFT", "3×")]:
        of = lambda who, key: [x[key] for x in r["rows"] if (x["job"], x["who"]) == (job, who)]
        median = lambda who, key: statistics.median(of(who, key))
        seconds = {"kto": of("kto", "wall_seconds"), "peer": of("peer", "work_seconds")}
        half = [(x["read_bytes"] + x["written_bytes"]) / 2 / x["copy_bytes_per_second"] / x["wall_seconds"] for x in r["rows"]
                if (x["job"], x["who"]) == (job, "kto")]
        times = [f"{statistics.median(s):.2f} ({min(s):.2f}–{max(s):.2f})" for s in (seconds["kto"], seconds["peer"])]
        faster = statistics.median(seconds["peer"]) / statistics.median(seconds["kto"])
        memory = [median(who, key) for key in ("peak_anonymous_bytes", "peak_rss_bytes") for who in ("kto", "peer")]
        rows.append([f"{ours} against {theirs}", *times, f"**{faster:.1f}×**", aim, f"{median('kto', 'cpu_seconds'):.1f} / {median('peer', 'cpu_seconds'):.0f}",
                     f"{mib(memory[0])} / {mib(memory[1])}", f"{memory[1] / memory[0]:.0f}×", f"{mib(memory[2])} / {mib(memory[3])}", f"{memory[3] / memory[2]:.0f}×", "8×",
                     f"{100 * statistics.median(half):.0f} %"])
    v = ", ".join(f"{k} {x}" for k, x in r["versions"].items())
    rate = statistics.median(x["copy_bytes_per_second"] for x in r["rows"]) / 1e9
    about_ = (f"{r['rows'][0]['read_bytes'] / 1e9:.2f} GB of bf16 weights in Llama 3.2 1B's shape; {v}; load before the run {r['machine']['load_1min']:.1f} on "
              f"{r['machine']['cores']} cores; the copy {rate:.1f} GB/s; {r['date']}, revision {r['revision']}.\n")
    head = ["", "ours, s", "peer, s", "faster", "aim", "CPU seconds", "peak, anonymous", "less", "peak, resident", "less", "aim", "share of a copy's rate"]
    return about_ + "\n" + table(head, rows)


def gpu_plans(results):
    """What kto-train plans for a GPU that is not there."""
    r, rows = results["gpu-plans"], []
    gib = lambda plan, key: f"{plan[key] / 2**30:.2f} GiB"
    for x in r["results"]:
        plan = x["within_aim"]
        kept, packs, weights, head, inputs = plan["choice"].split(", ")
        choice = f"{kept.replace(' blocks keep activations', ' blocks kept')}, {packs}, {weights}, {head}"
        host = gib(plan, "host_bytes")
        least = [gib(x[k], "memory") if k in x else "" for k in ("least", "least_resident")]
        fits = gib(plan, "predicted_bytes") if plan["accepted"] else f"missed: {gib(plan, 'predicted_bytes')}"
        rows.append([x["shape"], f"{x['batch']} × {x['prompt'] + x['completion']:,}", x["aim"], fits, choice, *least, host])
    head = ["shape", "rows", "aim", "predicted peak within the aim", "with", "least `--memory`", "least, weights resident", "host's memory"]
    said = (f"**Not run on a GPU**: predictions of `kto-train --dry-run --device cuda`, revision {r['revision']}, {r['date']}. NF4 with double quantization, LoRA of rank "
            f"{r['settings']['rank']} on all linear layers, {r['settings']['element']}, KTO with its KL rows, `make gpu-plans`. The engine's own allocations, which the limit is for; "
            "context and libraries of CUDA come on top.\n")
    return said + "\n" + table(head, rows)


SECTIONS = [
    ("Ours and the peer, interleaved", AIMS, lambda r: about(r) + "\n" + speed(r)),
    ("A whole epoch", {"paired-default": 0, "paired-precomputed": 0}, epoch),
    ("The peer's allocator", {"allocator": 0}, allocator),
    ("Growth with the length of a row", {"growth": 0}, growth),
    ("Large models", {"nf4-7b": 0, "nf4-14b": 0}, large),
    ("Memory: predicted and measured", {"memory": 0}, memory),
    ("Kernels against their floors", {"kernels": 0}, kernels),
    ("Data tools", {"data-convert": 0, "data-tokenize": 0, "data-memory": 0}, data),
    ("Quantizing and merging", {"rewrite": 0}, rewrite),
    ("GPU: the plan's numbers", {"gpu-plans": 0}, gpu_plans),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "bench/runs")
    parser.add_argument("--file", type=Path, default=ROOT / "BENCHMARKS.md")
    args = parser.parse_args()
    results = newest(args.runs)
    parts = [f"## {title}\n\n{write(results)}" for title, needs, write in SECTIONS if any(c in results for c in needs)]
    text = args.file.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    args.file.write_text(before + BEGIN + "\n\n" + "\n".join(parts) + "\n" + END + after)
    if "growth" in results:
        (args.runs.parent / "growth.svg").write_text(plot.growth(results["growth"]))


if __name__ == "__main__":
    main()
