"""Property-based equivalence testing: recipes for inputs, derived error bounds, laws.

A *recipe* is a plain dict of JSON types that describes one call completely: operator, dtype, sizes, layouts, value
kind, options, seed. Hypothesis or a seed draws recipes; a failure prints the line that repeats one.
"""

from .check import check_recipe, repeat_line
from .compare import Disagreement, bounds, compare
from .recipes import build, draw_recipe, recipes

__all__ = ["Disagreement", "bounds", "build", "check_recipe", "compare", "draw_recipe", "recipes", "repeat_line"]
