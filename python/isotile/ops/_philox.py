"""Philox-4x32-10, the counter-based generator behind dropout: every backend draws the same mask.

Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC11.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def _multiply(a: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * constant for 32-bit values held in int64, without overflowing int64."""
    low, high = a & 0xFFFF, a >> 16
    c_low, c_high = constant & 0xFFFF, constant >> 16
    middle = low * c_high + (low * c_low >> 16)
    cross = high * c_low + (middle & 0xFFFF)
    upper = high * c_high + (middle >> 16) + (cross >> 16)
    return upper & _MASK, (a * c_low + ((a * c_high & _MASK) << 16)) & _MASK


def first_word(c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """The first output word for counters (c0, c1, c2, 0) and a 64-bit key; int64 tensors holding 32-bit values."""
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0


def keep_mask(seed: torch.Tensor, batch_heads: int, queries: int, keys: int, p: float) -> torch.Tensor:
    """[batch_heads, queries, keys], True where dropout keeps the probability."""
    device = seed.device
    row = torch.arange(batch_heads, device=device, dtype=torch.int64)[:, None, None]
    query = torch.arange(queries, device=device, dtype=torch.int64)[None, :, None]
    key = torch.arange(keys, device=device, dtype=torch.int64)[None, None, :]
    key, query, row = torch.broadcast_tensors(key, query, row)
    word = first_word(key, query, row, seed.reshape(()).to(torch.int64))
    return (word >> 8).to(torch.float64) * 2.0**-24 >= p
