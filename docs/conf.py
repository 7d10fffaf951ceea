"""The documentation site: Sphinx over these pages, and a page for each operator made from its spec.

`make docs` builds it into site/, with warnings (a link that leads nowhere among them) as errors.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import _operators  # noqa: E402

import isotile  # noqa: E402

project = "isotile"
author = "The isotile authors"
version = release = isotile.__version__
copyright = f"{author}. Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["deflist"]
smartquotes = False  # "..." and quotes in the text are code as often as not
myst_heading_anchors = 3
nitpicky = True
suppress_warnings = ["myst.header"]  # generated pages may start a section below the first level

html_theme = "furo"
html_title = f"isotile {version}"
html_copy_source = False
html_show_sphinx = False

_operators.write(HERE / "operators", HERE.parent / "bench" / "results")
