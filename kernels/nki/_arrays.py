"""Host side of the NKI kernels: what the backend hands in (NumPy arrays or Neuron tensors) as the kernels want it."""

import math

import numpy as np

FLOATS = ("float32", "bfloat16", "float16")


def dtype_name(x):
    """`float32`, `bfloat16`, ... of an array, a tensor or a view."""
    return str(x.dtype).rsplit(".", 1)[-1]


def dense(x):
    """x itself if row-major, else a row-major copy."""
    return x.contiguous() if hasattr(x, "contiguous") else np.ascontiguousarray(x)


def strides(x):
    """Strides in elements."""
    return tuple(x.stride()) if callable(getattr(x, "stride", None)) else tuple(s // x.itemsize for s in x.strides)


def rows(x):
    """[B.., n] as dense [rows, n]."""
    return None if x is None else dense(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def matrices(x):
    """[B.., m, n] as dense ([batch, m, n] or [batch, n, m], transposed?). A batch that is broadcast whole becomes 1."""
    steps = strides(x)
    lead = [i for i in range(len(x.shape) - 2) if x.shape[i] != 1]
    if lead and all(steps[i] == 0 for i in lead):
        x = x[(slice(0, 1),) * (len(x.shape) - 2)]
        steps = strides(x)
    turned = x.shape[-2] > 1 and x.shape[-1] > 1 and steps[-2] == 1 and steps[-1] >= x.shape[-2]
    if turned:
        x = x.swapaxes(-1, -2)
    return dense(x).reshape(math.prod(x.shape[:-2]), x.shape[-2], x.shape[-1]), turned


def refuse_dtypes(views):
    """The reason why a named view's dtype is not served, or None."""
    for name, view in views.items():
        if view is not None and dtype_name(view) not in FLOATS:
            return f"{name} is {dtype_name(view)}; the NKI kernels take {', '.join(FLOATS)}"
    return None


def refuse_empty(views):
    for name, view in views.items():
        if view is not None and math.prod(view.shape) == 0:
            return f"{name} is empty {tuple(view.shape)}; a Neuron kernel has no empty tensors"
    return None


def as_bytes(x):
    """A bool array as uint8."""
    return x.byte() if hasattr(x, "byte") else x.view(np.uint8)


def as_words(seed):
    """[1] int64 as [1, 2] int32, the low word first; None stays None."""
    if seed is None:
        return None
    fresh = seed.repeat(2)[0:1]  # one element, whose stride may be anything in seed
    return fresh.view(seed.int().dtype if hasattr(seed, "int") else np.int32).reshape(1, 2)


def viewed(x, dtype):
    """The same bytes as another dtype of the same size."""
    if hasattr(x, "contiguous"):
        import torch

        return x.view(getattr(torch, dtype))
    return x.view(np.dtype(dtype))  # ml_dtypes registers the names of float8


def as_float32(x):
    return x.float() if hasattr(x, "float") else x.astype(np.float32)


def as_int32(x):
    return x.int() if hasattr(x, "int") else x.astype(np.int32)


def squeezed_mask(mask):
    """[B.., hq, sq, sk] as dense [B or 1, hq or 1, sq or 1, sk]: broadcast dims stay size 1."""
    steps, shape = strides(mask), tuple(mask.shape)
    lead = len(shape) - 3
    if lead and all(steps[i] == 0 or shape[i] == 1 for i in range(lead)):
        mask = mask[(slice(0, 1),) * lead]
    for dim in (lead, lead + 1):
        if steps[dim] == 0 and shape[dim] > 1:
            mask = mask[(slice(None),) * dim + (slice(0, 1),)]
    return dense(mask).reshape(math.prod(mask.shape[:lead]), *mask.shape[lead:])
