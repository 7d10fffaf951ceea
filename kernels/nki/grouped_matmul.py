"""Rows of a, split by offsets, each group times its own matrix; rows past the last offset give 0. Kernel:
`_grouped.py`.
"""

from ._arrays import dense, refuse_dtypes, refuse_empty
from ._grouped import grouped_kernel

NEEDS_VALUES = True  # the group ends decide how often its loops run


def supports(a, b, offsets, **rest):
    outs = rest.get("outs") or {}
    return refuse_dtypes({"a": a, "b": b, "y": outs.get("y")}) or refuse_empty({"a": a, "b": b, "offsets": offsets})


def run(a, b, offsets, *, outs, cores=1):
    """`outs`: {"y": dtype name}."""
    ends = dense(offsets).reshape(1, offsets.shape[0])
    return {"y": grouped_kernel[cores](dense(a), dense(b), ends, False, outs["y"])}
