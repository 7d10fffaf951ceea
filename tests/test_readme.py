"""The README's Python blocks run as they stand, top to bottom; its links lead somewhere."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_readme_examples_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) > 8
    torch.manual_seed(0)
    namespace = {"__name__": "readme"}
    for block in blocks:
        # Blank lines put the block at its own place, so that a traceback names the README's line.
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], "README.md", "exec"), namespace)


def test_readme_shows_every_operator():
    import isotile

    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in isotile._OPERATORS:
        assert f"**`{name}`**" in shown, f"the README has no example of {name}"
        assert f"isotile.{name}(" in shown, f"the README does not call {name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, f"{page} has no heading {target}"
        elif not target.startswith(("http://", "https://", "operators/")):  # the site's build makes those, and checks
            assert (ROOT / page).parent.joinpath(target.split("#")[0]).exists(), f"{page} links to {target}"


def test_contributing_shows_a_whole_operator():
    from isotile import precision

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    namespace = {"__name__": "isotile.ops.swiglu", "__package__": "isotile.ops"}
    exec(compile(block, "CONTRIBUTING.md", "exec"), namespace)
    spec = dataclasses.replace(namespace["SPEC"], name="swiglu")
    assert spec.schema("default") == "swiglu(Tensor gate, Tensor up) -> Tensor"
    gate, up = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).unbind()
    result = spec.reference(gate, up)["y"]
    with precision.exact():
        truth = spec.reference(gate, up)
    accumulated, _ = spec.error.terms(None, truth, None)["y"]
    unit = torch.finfo(torch.float32).eps / 2
    assert ((result - truth["y"]).abs() <= unit * (accumulated + 2 * truth["y"].abs())).all()
