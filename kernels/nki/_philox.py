"""Dropout's mask on the chip: Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, SC11), the words of every other backend.

32-bit products with wrap-around are tensor_tensor on GpSimd, exact for uint32 tiles; the high half of a product comes
from 16-bit halves, shifted and masked on Vector. Each block of scores costs 20 such products: 180 GpSimd and 140 Vector
instructions, so attention with dropout is bound by GpSimd. Nothing of it is stored.
"""

# Plain loops with append: the parser front end takes a subset of Python.

import nki.isa as nisa
import nki.language as nl

from ._tiles import constant, load_across

FACTORS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox_keys(seed):
    """[128, 2 * ROUNDS] uint32: both key words of every round; seed [1, 2] int32, the low word first."""
    words = load_across(seed, 128, 0, 2, nl.int32)
    keys = nl.ndarray((128, 2 * ROUNDS), nl.uint32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=keys[:, 0:2], src=words.view(nl.uint32))
    step = nl.ndarray((128, 2), nl.uint32, buffer=nl.sbuf)
    nisa.memset(dst=step[:, 0:1], value=WEYL[0])
    nisa.memset(dst=step[:, 1:2], value=WEYL[1])
    for r in range(2, 2 * ROUNDS, 2):
        _exact(keys[:, r : r + 2], keys[:, r - 2 : r], step, nl.add)
    return keys


def _exact(dst, data1, data2, op):
    nisa.tensor_tensor(dst=dst, data1=data1, data2=data2, op=op, engine=nisa.engine.gpsimd)


def _bits(data, op, operand):
    """A new tile: one or two bit operations with constants."""
    result = nl.ndarray(data.shape, nl.uint32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=result, data=data, op0=op, operand0=operand)
    return result


def _product(a, factor):
    """(high, low) words of a * factor, uint32 tiles like a."""
    p, width = a.shape
    whole = constant(p, 1, factor, nl.uint32).broadcast(1, width)
    low_factor = constant(p, 1, factor % 65536, nl.uint32).broadcast(1, width)
    high_factor = constant(p, 1, factor // 65536, nl.uint32).broadcast(1, width)
    low, high = _bits(a, nl.bitwise_and, 65535), _bits(a, nl.right_shift, 16)
    corner = nl.ndarray(a.shape, nl.uint32, buffer=nl.sbuf)
    _exact(corner, low, low_factor, nl.multiply)
    middle = nl.ndarray(a.shape, nl.uint32, buffer=nl.sbuf)
    _exact(middle, high, low_factor, nl.multiply)
    _exact(middle, middle, _bits(corner, nl.right_shift, 16), nl.add)
    cross = nl.ndarray(a.shape, nl.uint32, buffer=nl.sbuf)
    _exact(cross, low, high_factor, nl.multiply)
    _exact(cross, cross, _bits(middle, nl.bitwise_and, 65535), nl.add)
    upper = nl.ndarray(a.shape, nl.uint32, buffer=nl.sbuf)
    _exact(upper, high, high_factor, nl.multiply)
    _exact(upper, upper, _bits(middle, nl.right_shift, 16), nl.add)
    _exact(upper, upper, _bits(cross, nl.right_shift, 16), nl.add)
    lower = nl.ndarray(a.shape, nl.uint32, buffer=nl.sbuf)
    _exact(lower, a, whole, nl.multiply)
    return upper, lower


def _mixed(high, counter, key):
    """high ^ counter ^ key, in place of high; key is a [P, 1] column."""
    nisa.tensor_tensor(dst=high, data1=high, data2=counter, op=nl.bitwise_xor, engine=nisa.engine.vector)
    nisa.tensor_tensor(
        dst=high, data1=high, data2=key.broadcast(1, high.shape[1]), op=nl.bitwise_xor, engine=nisa.engine.vector
    )
    return high


def keep_tile(p, width, k0, q0, row0, packed, keys, threshold):
    """uint8 [P, width]: 1 where dropout keeps the probability of a query (row) and a key (column).

    Counters are (key, query, batch and head): keys from k0, queries from q0 down the partitions, or, packed, the query
    q0 of heads from row0 down the partitions. A probability is kept if its 24 random bits reach the threshold.
    """
    counters = []
    for pattern, offset, step in (
        ([[1, width]], k0, 0),
        ([[0, width]], q0, 0 if packed else 1),
        ([[0, width]], row0, 1 if packed else 0),
    ):
        counter = nl.ndarray((p, width), nl.uint32, buffer=nl.sbuf)
        nisa.iota(dst=counter, pattern=pattern, offset=offset, channel_multiplier=step)
        counters.append(counter)
    c0, c1, c2 = counters
    c3 = constant(p, width, 0, nl.uint32)
    for r in range(ROUNDS):
        high0, low0 = _product(c0, FACTORS[0])
        high1, low1 = _product(c2, FACTORS[1])
        c0 = _mixed(high1, c1, keys[0:p, 2 * r : 2 * r + 1])
        c2 = _mixed(high0, c3, keys[0:p, 2 * r + 1 : 2 * r + 2])
        c1, c3 = low1, low0
    keep = nl.ndarray((p, width), nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=keep, data=_bits(c0, nl.right_shift, 8), op0=nl.greater_equal, operand0=float(threshold)
    )
    return keep
