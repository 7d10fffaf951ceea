"""The pages of the site: their Python runs, their commands parse, and the site builds without a warning."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md"))
WRITTEN = [*PAGES, "README.md", "CONTRIBUTING.md"]


def blocks(page, language):
    """(line, text) of each block of a language. Sketches that cannot run by themselves are marked `py`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text[: block.start(1)].count("\n"), block[1]


@pytest.mark.parametrize("page", [p for p in PAGES if list(blocks(p, "python"))])
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    with warnings.catch_warnings():  # a page may set filters
        for line, text in blocks(page, "python"):
            exec(compile("\n" * line + text, page, "exec"), namespace)


def parsers():
    """The argument parser of each command that the pages show."""
    from isotile import verify
    from isotile.bench import command, compare, readme, report, traces
    from isotile.verify import compare as joined

    return {
        ("bench", "compare"): compare.parser,
        ("bench", "report"): report.parser,
        ("bench", "readme"): readme.parser,
        ("bench", "trace"): traces.parser,
        ("bench",): command.parser,
        ("verify", "compare"): joined.parser,
        ("verify", "check"): verify.command.check_parser,
        ("verify", "report"): verify.command.report_parser,
        ("verify",): verify.command.parser,
    }


@pytest.mark.parametrize("page", [p for p in WRITTEN if list(blocks(p, "sh"))])
def test_commands_of_a_page_parse(page, capsys):
    for line, text in blocks(page, "sh"):
        for words in (shlex.split(row, comments=True) for row in text.splitlines()):
            if words[:1] != ["isotile"] or words[1] not in ("bench", "verify"):
                continue
            known = parsers()
            key = tuple(words[1:3]) if tuple(words[1:3]) in known else (words[1],)
            try:
                known[key]().parse_args(words[1 + len(key) :])
            except SystemExit:
                pytest.fail(f"{page}, block at line {line}: {shlex.join(words)}: {capsys.readouterr().err}")


def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx")
    for module in ("myst_parser", "furo"):
        pytest.importorskip(module)
    words = ["-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", str(tmp_path / "doctrees")]
    done = subprocess.run(
        [sys.executable, *words, str(ROOT / "docs"), str(tmp_path / "site")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "operators" / "attention.html").read_text(encoding="utf-8")
    assert "query is float64; the NKI kernels take" in page  # a refusal, in the backend's words
    assert "scaled_dot_product_attention" in page and "seqlens_k" in page
    for path in (tmp_path / "site").rglob("*.html"):  # it can be read without a network
        assets = re.findall(r"""(?:src=|rel="stylesheet"[^>]*href=)["']([^"']+)""", path.read_text(encoding="utf-8"))
        assert assets and not [a for a in assets if "//" in a], path
