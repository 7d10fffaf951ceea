"""`nki.collectives`: named so that kernels import; as in the SDK's simulator, none of them is emulated."""

from __future__ import annotations

from .machine import NkiValidationError
from .tensor import NKIObject


class ReplicaGroup(NKIObject):
    def __init__(self, groups=None):
        self.groups = groups


def _absent(name):
    def function(*args, **kwargs):
        raise NkiValidationError(f"nki.collectives.{name} needs several devices and is not emulated")

    function.__name__ = name
    return function


_NAMES = (
    "all_reduce",
    "all_gather",
    "all_gather_v",
    "reduce_scatter",
    "all_to_all",
    "all_to_all_v",
    "collective_permute",
    "collective_permute_implicit",
    "collective_permute_implicit_reduce",
    "collective_permute_implicit_current_processing_rank_id",
    "rank_id",
)
for _name in _NAMES:
    globals()[_name] = _absent(_name)
__all__ = ["ReplicaGroup", *_NAMES]
