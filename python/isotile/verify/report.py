"""The report: made, sealed, checked, written as JSON, HTML and JUnit XML."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
import os
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from .claims import CLAIMS, FAILS, HOLDS, NOT_RUN

FORMAT, VERSION = "isotile-verify", 1
#: What the digest over the results covers: equal on two runs that gave the same numbers.
RESULTS = ("definition", "seed", "claims", "errors", "coverage", "examples", "absent", "verdict", "complete")


class NotAReport(ValueError):
    """A file that is not a whole and unchanged report; the message says why."""


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode()


def sha256(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as strings, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def make(
    *,
    about: dict[str, Any],
    records: dict[str, Any],
    backends: list[dict[str, Any]],
    absent: dict[str, str],
    definition: str,
    settings: dict[str, Any],
    complete: bool,
    stopped: str | None,
    elapsed_s: float,
) -> dict[str, Any]:
    """A sealed report."""
    verdicts = Counter(c["verdict"] for c in records["claims"])
    verdict = FAILS if verdicts[FAILS] else HOLDS if complete else "incomplete"
    return seal(
        {
            "format": FORMAT,
            "version": VERSION,
            "verdict": verdict,
            "complete": complete,
            "stopped": stopped,
            "counts": {v: verdicts[v] for v in (HOLDS, FAILS, NOT_RUN)},
            "definition": definition,
            "seed": settings["seed"],
            "settings": settings,
            "backends": backends,
            "absent": absent,
            "elapsed_s": round(elapsed_s, 1),
            "provenance": about,
            "promises": {name: {"title": title, "text": text} for name, (title, text) in CLAIMS.items()},
            **records,
        }
    )


def seal(report: dict[str, Any]) -> dict[str, Any]:
    """The report with its two digests: over the results, and over everything."""
    plain = finite({k: v for k, v in report.items() if k != "digest"})
    # What is not a plain JSON type (a version object, say) is its string.
    plain = json.loads(json.dumps(plain, default=str, allow_nan=False))
    plain["digest"] = {"results": sha256({k: plain[k] for k in RESULTS})}
    plain["digest"]["report"] = sha256(plain)
    return plain


def check(report: Any) -> None:
    """That a report is whole and as it was written.

    Raises:
        NotAReport: it is not, with what is wrong.
    """
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise NotAReport(f"not a report of isotile verify (no format {FORMAT!r})")
    if report.get("version") != VERSION:
        raise NotAReport(f"a report of version {report.get('version')}; this isotile reads version {VERSION}")
    try:
        results = sha256({k: report[k] for k in RESULTS})
        given = report["digest"]
        plain = {**{k: v for k, v in report.items() if k != "digest"}, "digest": {"results": given["results"]}}
        whole = sha256(plain)
    except (KeyError, TypeError) as error:
        raise NotAReport(f"a part is missing: {error}") from None
    if given["results"] != results:
        raise NotAReport("the results are not those that the digest was taken of: the file was changed")
    if given.get("report") != whole:
        raise NotAReport("provenance or settings are not those that the digest was taken of: the file was changed")
    for claim in report["claims"]:
        verdict = FAILS if claim.get("failed") else HOLDS if claim["examples"] else NOT_RUN
        if claim["verdict"] != verdict:
            raise NotAReport(f"{claim['op']} {claim['dtype']} {claim['backend']} {claim['claim']}: not its own verdict")


def read(path: Path) -> dict[str, Any]:
    """A report from its file, checked.

    Raises:
        NotAReport: naming the file and what is wrong.
        OSError: it cannot be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotAReport(f"{path}: not JSON ({error})") from None
    try:
        check(report)
    except NotAReport as error:
        raise NotAReport(f"{path}: {error}") from None
    return report


def write(path: Path, text: str) -> None:
    """A whole file or the old one, never a part."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_all(report: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """JSON, HTML and JUnit XML of one report."""
    paths = {
        folder / f"{stem}.json": spelled(report),
        folder / f"{stem}.html": page(report),
        folder / f"{stem}.xml": junit(report),
    }
    for path, text in paths.items():
        write(path, text)
    return list(paths)


def spelled(report: dict[str, Any]) -> str:
    """JSON with a line for each claim and example: readable, and small."""
    lines = []
    for key, value in report.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in value)
            lines.append(f"{json.dumps(key)}: [\n{rows}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def schema() -> dict[str, Any]:
    """The JSON schema that every report keeps."""
    return json.loads(importlib.resources.files(__package__).joinpath("schema.json").read_text(encoding="utf-8"))


def page(report: dict[str, Any]) -> str:
    """One self-contained HTML file."""
    shown = {k: v for k, v in report.items() if k != "examples"} | {"examples": len(report["examples"])}
    # "</" in a string would end the script element.
    data = json.dumps(shown, allow_nan=False).replace("</", "<\\/")
    template = importlib.resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", data)


def junit(report: dict[str, Any]) -> str:
    """JUnit XML: a suite for each operator, a case for each claim; what was not run is skipped with its reason."""
    root = ET.Element("testsuites", name="isotile verify")
    totals: Counter[str] = Counter()
    for op in dict.fromkeys(c["op"] for c in report["claims"]):
        claims = [c for c in report["claims"] if c["op"] == op]
        counts = Counter(c["verdict"] for c in claims)
        totals += counts
        suite = ET.SubElement(
            root, "testsuite", name=op, tests=str(len(claims)), failures=str(counts[FAILS]),
            skipped=str(counts[NOT_RUN]), errors="0", timestamp=report["provenance"]["started"][:19],
        )  # fmt: skip
        for claim in claims:
            name = f"{claim['claim']}[{claim['dtype']}-{claim['backend']}]"
            case = ET.SubElement(suite, "testcase", classname=f"isotile.verify.{op}", name=name, time="0")
            if claim["verdict"] == FAILS:
                first = claim["failures"][0]
                failure = ET.SubElement(case, "failure", message=_plain(first["message"].splitlines()[0]))
                failure.text = _plain("\n\n".join(f"{f['message']}\nrepeat: {f['repeat']}" for f in claim["failures"]))
            elif claim["verdict"] == NOT_RUN:
                ET.SubElement(case, "skipped", message=_plain(claim["reason"]))
    if not report["complete"]:
        suite = ET.SubElement(root, "testsuite", name="run", tests="1", failures="0", skipped="0", errors="1")
        case = ET.SubElement(suite, "testcase", classname="isotile.verify", name="complete", time="0")
        ET.SubElement(case, "error", message=_plain(f"the run is incomplete: {report['stopped']}"))
    incomplete = 0 if report["complete"] else 1
    root.set("tests", str(sum(totals.values()) + incomplete))
    root.set("failures", str(totals[FAILS]))
    root.set("skipped", str(totals[NOT_RUN]))
    root.set("errors", str(incomplete))
    root.set("time", str(report["elapsed_s"]))
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _plain(text: str) -> str:
    """Without the control characters that XML has no way to write."""
    return "".join(c if c in "\n\t" or ord(c) >= 32 else " " for c in text)
