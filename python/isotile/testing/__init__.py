"""Property-based equivalence testing: recipes for inputs, derived error bounds, laws; for your own kernels too.

A *recipe* is a plain dict of JSON types that describes one call completely: operator, dtype, sizes, layouts, value
kind, options, seed. Hypothesis or a seed draws recipes; a failure prints the line that repeats one.
`assert_equivalent` does it for two functions of yours.
"""

from .check import check_recipe, repeat_line
from .compare import Disagreement, bounds, compare
from .draws import Random
from .equivalence import Equivalence, assert_equivalent
from .recipes import KINDS, build, draw_recipe, recipes

__all__ = [
    "KINDS",
    "Disagreement",
    "Equivalence",
    "Random",
    "assert_equivalent",
    "bounds",
    "build",
    "check_recipe",
    "compare",
    "draw_recipe",
    "recipes",
    "repeat_line",
]
