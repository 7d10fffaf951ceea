"""Host side of the kernels: merging loop dimensions, checks that all kernels share, and where they will run."""

import math

import torch

import triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_LOOPS = 3
MAX_GRID = 2**31 - 1


def product(sizes):
    total = 1
    for size in sizes:
        total *= size
    return total


def next_power(n, least=1):
    return max(least, triton.next_power_of_2(max(n, 1)))


def architecture():
    """What the active driver compiles for: ("cuda", 90), ("hip", "gfx942") or ("interpreter", 0)."""
    if triton.knobs.runtime.interpret:
        return "interpreter", 0
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


# Multiprocessors, where no device can be asked (compiling ahead of time).
_UNITS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170, "gfx90a": 104, "gfx942": 304, "gfx950": 256}


def units(device):
    """Number of multiprocessors of the device a plan is made for."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _UNITS.get(architecture()[1], 132)


def merge_loops(sizes, strides):
    """Merges loop dimensions that every tensor walks evenly; drops those of size 1.

    Args:
        sizes: the common loop sizes.
        strides: for each tensor its strides over them.
    Returns:
        (sizes, strides of each tensor), with as few dimensions as possible.
    """
    kept, kept_strides = [], [[] for _ in strides]
    for d, size in enumerate(sizes):
        if size == 1:
            continue
        steps = [s[d] for s in strides]
        if kept and all(outer[-1] == step * size for outer, step in zip(kept_strides, steps, strict=True)):
            kept[-1] *= size
            for outer, step in zip(kept_strides, steps, strict=True):
                outer[-1] = step
        else:
            kept.append(size)
            for outer, step in zip(kept_strides, steps, strict=True):
                outer.append(step)
    return tuple(kept), [tuple(s) for s in kept_strides]


def loops(views, core):
    """Loop sizes and each view's strides, padded in front to MAX_LOOPS. `core`: number of core dims of each view.

    Absent views give zero strides. Raises if more than MAX_LOOPS remain; `refuse_loops` tells beforehand.
    """
    present = [(v, c) for v, c in zip(views, core, strict=True) if v is not None]
    sizes = present[0][0].shape[: len(present[0][0].shape) - present[0][1]]
    merged, strides = merge_loops(sizes, [v.strides[: len(sizes)] for v, _ in present])
    if len(merged) > MAX_LOOPS:
        raise ValueError(f"{len(merged)} loop dimensions, at most {MAX_LOOPS}")
    pad = MAX_LOOPS - len(merged)
    padded = iter([(0,) * pad + s for s in strides])
    return (1,) * pad + merged, [next(padded) if v is not None else (0,) * MAX_LOOPS for v in views]


def refuse_loops(views, core):
    present = [(v, c) for v, c in zip(views, core, strict=True) if v is not None]
    sizes = present[0][0].shape[: len(present[0][0].shape) - present[0][1]]
    if 0 in sizes:
        return None
    merged, _ = merge_loops(sizes, [v.strides[: len(sizes)] for v, _ in present])
    if len(merged) > MAX_LOOPS:
        return f"{len(merged)} leading dimensions remain after merging, the kernel walks at most {MAX_LOOPS}"
    return None


def refuse_dtypes(floats, **others):
    for name, view in floats.items():
        if view is not None and view.dtype not in FLOATS:
            return f"{name} is {str(view.dtype).removeprefix('torch.')}; Triton kernels take float32, bfloat16, float16"
    return None


def wide(*spans):
    """True if offsets inside one row or tile can exceed 32 bits. `spans`: (size, stride) pairs."""
    return any((size - 1) * abs(stride) >= 2**31 - 2**20 for size, stride in spans if size > 0)


def read_config(config):
    """(numbers, whether the batch may not matter): config is None, a dict of numbers, or "batch_invariant"."""
    if config == "batch_invariant":
        return {}, True
    config = dict(config or {})
    return config, config.pop("batch_invariant", False)


def override(default, config):
    """The default configuration with the caller's numbers in place."""
    config, _ = read_config(config)
    if not config:
        return default
    unknown = set(config) - set(default)
    if unknown:
        raise ValueError(f"unknown configuration keys {sorted(unknown)}; known are {sorted(default)}")
    return {**default, **config}


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def cheapest(costed):
    """Candidates of a configuration, [(modelled cost, config), ...], least cost first, each config once."""
    seen, found = set(), []
    for cost, config in sorted(costed, key=lambda pair: pair[0]):
        key = repr(sorted(config.items(), key=lambda item: item[0]))
        if key not in seen:
            seen.add(key)
            found.append((cost, config))
    return found


def whole_row(n, widest, chunk):
    """Whether rows of n are held whole: not wider than `widest`, nor padded by more than two thirds beyond a chunk."""
    return (n <= widest and next_power(n) * 3 <= n * 5) or n <= chunk


def row_problem(x, whole):
    """What a tuned configuration of a row kernel depends on."""
    n = x.shape[-1]
    return {"dtype": dtype_name(x.dtype), "whole": whole, "rows": x.numel() // max(n, 1), "n": n}


def row_candidates(problem, elements, own, limit):
    """Configurations of a kernel of whole rows: tiles of about `elements`, `own` of them a thread, and others near.

    All move the same bytes, so that a model cannot tell them apart: the kernel's own choice goes first.
    """
    block_n = next_power(problem["n"], 16)
    found = []
    for size in (elements, 2 * elements, elements // 2):
        rows = max(1, min(size // block_n, 64))
        for each in (8, 16, 32, 64):
            warps = rows * block_n // (32 * each)
            if 1 <= warps <= limit and warps & (warps - 1) == 0:
                cost = 1.0 + 0.02 * (size != elements) + 0.01 * abs(math.log2(each / own))
                found.append((cost, {"ROWS": rows, "num_warps": warps}))
    return cheapest(found)


def chunk_candidates(extra=None):
    """Configurations of a kernel that walks wide rows in chunks."""
    return cheapest(
        (1.0 + 0.01 * i, {"BLOCK_N": block, "num_warps": warps, **(extra or {})})
        for i, (block, warps) in enumerate(((4096, 8), (8192, 16), (4096, 16), (8192, 8), (2048, 4), (2048, 8)))
    )
