"""Results on disk: JSON lines and CSV, valid at every moment of a run."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

#: Of a row's fields, those that the CSV has, in order; a column for the speed against each rival follows.
COLUMNS = (
    "op", "case", "dtype", "direction", "contender", "device", "threads", "status", "median_s", "q1_s", "q3_s",
    "gb_per_s", "tflops", "roofline_share", "host_s", "peak_extra_bytes", "first_call_s", "bound_share",
    "relative_error", "tokens", "usd_per_million_calls", "usd_per_billion_tokens", "cold", "quiet", "reason",
)  # fmt: skip


class Writer:
    """`<stem>.jsonl` and `<stem>.csv`. Each record is one write of whole lines: a run cut off leaves valid files."""

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = "bench-" + header["date"][:19].replace("-", "").replace(":", "").replace("T", "-")
        taken = 0
        while (folder / f"{stem}{f'-{taken}' if taken else ''}.jsonl").exists():
            taken += 1
        stem = f"{stem}-{taken}" if taken else stem
        self.jsonl = folder / f"{stem}.jsonl"
        self.csv = folder / f"{stem}.csv"
        self._lines = self.jsonl.open("x", encoding="utf-8", buffering=1)
        self._table = self.csv.open("x", encoding="utf-8", newline="", buffering=1)
        self._csv = csv.writer(self._table)
        self._columns = (*COLUMNS, *(f"speed_vs_{n}" for n in header.get("rivals", ())))
        self._csv.writerow(self._columns)
        self.write({"kind": "run", **header})

    def write(self, record: dict[str, Any]) -> None:
        self._lines.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._lines.flush()
        if record["kind"] == "row":
            flat = {**record, **{f"speed_vs_{n}": r["median"] for n, r in (record.get("speed_vs") or {}).items()}}
            self._csv.writerow([finite(flat.get(c)) for c in self._columns])
            self._table.flush()

    def close(self) -> None:
        self._lines.close()
        self._table.close()


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as strings, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class NotARun(ValueError):
    """A file that is not the JSON lines of a run; the message says where."""


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any] | None]:
    """(run, rows, end) of a JSON lines file; `end` is None where the run was cut off.

    Raises:
        NotARun: naming the line that is none of them.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise NotARun(f"{path}:{number}: not JSON ({error})") from None
    if not records or not isinstance(records[0], dict) or records[0].get("kind") != "run":
        raise NotARun(f"{path}: wanted the record of a run in the first line")
    ends = [r for r in records if r.get("kind") == "end"]
    return records[0], [r for r in records if r.get("kind") == "row"], ends[-1] if ends else None
