#!/usr/bin/env python3
"""Writes testdata/containers: the same preferences in every container that kto-convert reads, and the records that must come out.

Needs pyarrow and datasets (scripts/bench/requirements.txt has them). The rows are made up here.
"""
import csv
import gzip
import json
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

OUT = Path(__file__).resolve().parents[2] / "testdata" / "containers"
SIDES = [
    ("Is it raining?", "No, the sky is clear.", "Hm."),
    ("Größe des Mondes?", "Der Durchmesser beträgt 3475 km.", "Groß 🌕"),
    ('Say "hi",\nthen stop.', "hi", "hello\thello"),
    ("2+2?", "4", "5"),
    ("Name a colour.", "Blue.", "Seven."),
]


def turn(role, content):
    return {"role": role, "content": content}


def main():
    shutil.rmtree(OUT / "saved", ignore_errors=True)
    rows, records = [], []
    for i, (prompt, chosen, rejected) in enumerate(SIDES):
        asked = [turn("system", "Be brief.")] * (i % 2) + [turn("user", prompt)]
        sides = [[turn("assistant", chosen)], [turn("assistant", rejected)]]
        rows.append({"id": i, "prompt": asked, "chosen": sides[0], "rejected": sides[1]})
        records += [{"prompt": asked, "completion": s, "label": s is sides[0]} for s in sides]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (OUT / "expected.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    (OUT / "lines.jsonl").write_text(lines)
    (OUT / "array.json").write_text(json.dumps(rows, ensure_ascii=True, indent=2))
    (OUT / "values.json").write_text("\n".join(json.dumps(r, indent=1) for r in rows))
    (OUT / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (OUT / "array.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode(), mtime=0))
    with pa.CompressedOutputStream(str(OUT / "lines.jsonl.zst"), "zstd") as f:
        f.write(lines.encode())
    for name, delimiter in [("table.csv", ","), ("table.tsv", "\t")]:
        with open(OUT / name, "w", newline="") as f:
            out = csv.writer(f, delimiter=delimiter)
            out.writerow(["id", "prompt", "chosen", "rejected"])
            for r in rows:
                out.writerow([r["id"]] + [json.dumps(r[k]) for k in ("prompt", "chosen", "rejected")])
    table = pa.Table.from_pylist(rows)
    for codec in ["snappy", "zstd", "gzip", "none"]:
        pq.write_table(table, OUT / f"{codec}.parquet", compression=codec, row_group_size=2)
    (OUT / "snappy.parquet.gz").write_bytes(gzip.compress((OUT / "snappy.parquet").read_bytes(), mtime=0))
    with pa.ipc.new_stream(OUT / "stream.arrow", table.schema) as f:
        f.write_table(table, max_chunksize=2)
    feather.write_feather(table, OUT / "file.feather", compression="uncompressed")
    (OUT / "stream.arrow.gz").write_bytes(gzip.compress((OUT / "stream.arrow").read_bytes(), mtime=0))
    # Faults: a label that is a list, a type that is not read, no rows.
    pq.write_table(pa.table({"prompt": ["p"], "completion": ["c"], "label": [[True]]}), OUT / "label_list.parquet")
    months = pa.array([pa.MonthDayNano([1, 2, 3])])
    interval = pa.table({"prompt": ["p"], "completion": ["c"], "label": months})
    with pa.ipc.new_stream(OUT / "interval.arrow", interval.schema) as f:
        f.write_table(interval)
    pq.write_table(table.slice(0, 0), OUT / "no_rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(OUT / "saved", num_shards=2)


if __name__ == "__main__":
    main()
