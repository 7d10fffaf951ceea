"""`nki.typing`: annotations such as `nt.tensor[128, 512]`; they say, and check, nothing at run time."""

from __future__ import annotations


class _Tensor:
    def __class_getitem__(cls, shape):
        return cls


tensor = _Tensor
mutable_tensor = _Tensor
