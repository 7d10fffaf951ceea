"""A real browser for the pages that isotile writes: headless Chromium, driven by playwright.

`make test` installs Debian's `chromium-headless-shell` where apt is at hand; where there is none a test skips and says
so. A page may ask the network for nothing, and may not log an error.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: (width, height) in CSS pixels
DESKTOP, PHONE = (1400, 900), (390, 844)
PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")


def program() -> str:
    """The browser's path; skips the test where there is none."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is on the path")
    return found


@contextlib.contextmanager
def opened(page: Path, size: tuple[int, int] = DESKTOP, dark: bool = False) -> Iterator[Any]:
    """A file in a browser window of this size, as playwright's `Page`.

    Fails if the page logged an error, raised one, or asked for anything beside itself.
    """
    path = program()
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            width, height = size
            shown = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                has_touch=width < 600,
            )
            shown.on("pageerror", lambda e: complaints.append(f"raised {e}"))
            shown.on("console", lambda m: complaints.append(f"logged {m.text}") if m.type == "error" else None)
            shown.on("request", lambda r: complaints.append(f"asked for {r.url}") if _away(r) else None)
            shown.goto(page.resolve().as_uri())
            yield shown
        finally:
            browser.close()
    assert not complaints, f"{page.name} {'; '.join(complaints)}"


def _away(request: Any) -> bool:
    return not request.url.startswith(("data:", "blob:")) and not request.is_navigation_request()


def overflow(page: Any) -> int:
    """CSS pixels by which the page is wider than the window: a reader on a phone would have to scroll sideways."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
