"""Attention forward: out = softmax(scale * q k^T with softcap, ALiBi, mask, windows, sinks) v, and the log-sum-exp.

Queries on partitions, 128 at a time (for one-query decoding the heads of a key/value group); keys along the free dim
in blocks of 512 (one PSUM bank) and sections of SECTION. A section's maximum is taken from PSUM, one exp pass gives
the probabilities and their sum, and running maximum, sum and output are rescaled once for a section (online softmax,
Milakov and Gimelshein 2018; Dao et al. 2022). Probabilities are turned by DMA and on the Tensor engine in turn
(gen2: by DMA only, its Tensor engine spreads a NaN). Without per-query bounds key p * 16 + c of a section belongs to
chunk c, so that values arrive in runs of 16 rows. Keys and values of a head are read once for all its queries where
they fit RESIDENT_BYTES.

Blocks that no query of the tile sees are skipped; a block that some see is masked by run-time bounds (range_select).
There a value that is not finite is replaced by 0 and added back for the queries that see it, so that 0 * NaN never
leaks; a visible weight that underflows counts there as positive.
"""

# Plain loops with append: the parser front end takes a subset of Python.
# ruff: noqa: PERF401

import math

import nki
import nki.isa as nisa
import nki.language as nl

from ._arrays import (
    FLOATS,
    as_bytes,
    as_int32,
    as_words,
    dense,
    dtype_name,
    refuse_dtypes,
    refuse_empty,
    squeezed_mask,
)
from ._philox import keep_tile, philox_keys
from ._tiles import FLOAT32_MIN, column, constant, load_across, my_tiles
from .matmul import load_contraction

SECTION = 2048
RESIDENT_BYTES = 98304
FLOOR = -1.0e30  # running maximum of a row that has seen no key
FLOAT32_MAX = 3.4028234663852886e38


def query_bounds(q0, p, sq, sk, keys_across, options):
    """(position, low, high) columns [P, 1] float32: query row sees key k if low <= k < high."""
    position = column(p)
    nisa.iota(dst=position, pattern=[[0, 1]], offset=q0, channel_multiplier=options["row_step"])
    if options["bottom_right"]:
        if options["has_seqlens"]:
            nisa.tensor_tensor(dst=position, data1=position, data2=keys_across[0:p], op=nl.add)
            nisa.tensor_scalar(dst=position, data=position, op0=nl.subtract, operand0=float(sq))
        else:
            nisa.tensor_scalar(dst=position, data=position, op0=nl.add, operand0=float(sk - sq))
    high = constant(p, 1, float(sk), nl.float32)
    if options["has_seqlens"]:
        nisa.tensor_copy(dst=high, src=keys_across[0:p])
    right = options["window_right"]
    if options["is_causal"]:
        right = 0 if right < 0 else min(right, 0)
    edge = column(p)
    if right >= 0:
        nisa.tensor_scalar(dst=edge, data=position, op0=nl.add, operand0=float(right + 1))
        nisa.tensor_tensor(dst=high, data1=high, data2=edge, op=nl.minimum)
    low = constant(p, 1, -1.0, nl.float32)
    if options["window_left"] >= 0:
        nisa.tensor_scalar(dst=low, data=position, op0=nl.subtract, operand0=float(options["window_left"]))
    return position, low, high


def block_kind(k0, k1, q0, q1, sq, sk, options):
    """0: hidden from all queries of the tile, 1: seen by all, 2: decided by the bounds at run time."""
    kind = 2 if options["has_seqlens"] else 1
    if options["has_seqlens"] and options["bottom_right"]:
        return 2
    offset = sk - sq if options["bottom_right"] else 0
    first, last = q0 + offset, q1 - 1 + offset
    if options["row_step"] == 0:
        first = last = offset
    right = options["window_right"]
    if options["is_causal"]:
        right = 0
    if right >= 0:
        if k0 > last + right:
            return 0
        if k1 - 1 > first + right:
            kind = 2
    if options["window_left"] >= 0:
        if k1 - 1 < first - options["window_left"]:
            return 0
        if k0 < last - options["window_left"]:
            kind = 2
    return kind


def hide(dst, src, k0, low, high, top):
    """dst = src with the keys outside [low, high) at the lowest float32, its maximum into top; src may be in PSUM."""
    p, width = dst.shape
    if nisa.get_nc_version() >= nisa.nc_version.gen3:
        nisa.range_select(
            dst=dst,
            on_true_tile=src,
            comp_op0=nl.greater_equal,
            comp_op1=nl.less,
            bound0=low,
            bound1=high,
            range_start=k0,
            reduce_res=top,
        )
    else:
        key = nl.ndarray((p, width), nl.float32, buffer=nl.sbuf)
        nisa.iota(dst=key, pattern=[[1, width]], offset=k0, channel_multiplier=0)
        out = nl.ndarray((p, width), nl.uint8, buffer=nl.sbuf)
        nisa.tensor_copy(dst=dst, src=src)
        nisa.tensor_scalar(dst=out, data=key, op0=nl.less, operand0=low)
        nisa.tensor_copy_predicated(dst=dst, src=FLOAT32_MIN, predicate=out)
        nisa.tensor_scalar(dst=out, data=key, op0=nl.greater_equal, operand0=high)
        nisa.tensor_copy_predicated(dst=dst, src=FLOAT32_MIN, predicate=out)
        nisa.tensor_reduce(dst=top, op=nl.maximum, data=dst, axis=1)


def load_mask(mask, b, h, q0, q1, k0, k1):
    """[P, keys] of the mask for these queries; a broadcast query dim is repeated over the partitions."""
    piece = mask[min(b, mask.shape[0] - 1), min(h, mask.shape[1] - 1)]
    tile_sbuf = nl.ndarray((q1 - q0, k1 - k0), mask.dtype, buffer=nl.sbuf)
    if mask.shape[2] == 1:
        nisa.dma_copy(dst=tile_sbuf, src=piece[:, k0:k1].broadcast(0, q1 - q0))
    else:
        nisa.dma_copy(dst=tile_sbuf, src=piece[q0:q1, k0:k1])
    return tile_sbuf


def hidden_by_mask(mask_sbuf):
    """uint8 [P, keys]: 1 where the mask hides."""
    out = nl.ndarray(mask_sbuf.shape, nl.uint8, buffer=nl.sbuf)
    value = 0.0 if mask_sbuf.dtype == nl.uint8 else -math.inf
    nisa.tensor_scalar(dst=out, data=mask_sbuf, op0=nl.equal, operand0=value)
    return out


def natural_scores(product_psum, k0, position, slope, mask_sbuf, options):
    """softcap(scale * product) - slope * |position - key| + mask, float32 in SBUF; hidden by the mask: the lowest."""
    p, width = product_psum.shape
    score = nl.ndarray((p, width), nl.float32, buffer=nl.sbuf)
    if options["softcap"] > 0.0:
        nisa.activation(dst=score, op=nl.tanh, data=product_psum, scale=options["scale"] / options["softcap"])
        nisa.tensor_scalar(dst=score, data=score, op0=nl.multiply, operand0=options["softcap"])
    else:
        nisa.activation(dst=score, op=nl.copy, data=product_psum, scale=options["scale"])
    if options["has_alibi"]:
        distance = nl.ndarray((p, width), nl.float32, buffer=nl.sbuf)
        nisa.iota(dst=distance, pattern=[[1, width]], offset=k0, channel_multiplier=0)
        nisa.tensor_scalar(dst=distance, data=distance, op0=nl.subtract, operand0=position)
        nisa.scalar_tensor_tensor(
            dst=distance, data=distance, op0=nl.multiply, operand0=-1.0, op1=nl.maximum, operand1=distance
        )
        nisa.tensor_scalar(dst=distance, data=distance, op0=nl.multiply, operand0=slope)
        nisa.tensor_tensor(dst=score, data1=score, data2=distance, op=nl.subtract)
    if options["has_mask"]:
        if options["float_mask"]:
            nisa.tensor_tensor(dst=score, data1=score, data2=mask_sbuf, op=nl.add)
        nisa.tensor_copy_predicated(dst=score, src=FLOAT32_MIN, predicate=hidden_by_mask(mask_sbuf))
    return score


def products(q_tiles, k_tiles, start, stop):
    """[P, stop - start] in PSUM: q k^T over all pieces of the head dim."""
    bank = nl.ndarray((q_tiles[0].shape[1], stop - start), nl.float32, buffer=nl.psum)
    for i in range(len(q_tiles)):
        nisa.nc_matmul(dst=bank, stationary=q_tiles[i], moving=k_tiles[i][:, start:stop])
    return bank


def head_column(values, b, h, p, options):
    """[P, 1] float32 of a per-head vector [heads, 1]: the head's value, or in packed decoding each row's own head's."""
    tile_sbuf = nl.ndarray((p, 1), values.dtype, buffer=nl.sbuf)
    if options["packed"]:
        nisa.dma_copy(dst=tile_sbuf, src=values[h * options["group"] : h * options["group"] + p])
    else:
        nisa.dma_copy(dst=tile_sbuf, src=values[h : h + 1].broadcast(0, p))
    wide = column(p)
    nisa.tensor_copy(dst=wide, src=tile_sbuf)
    return wide


def turn(data, turned_count, by_dma):
    """[columns, P] in SBUF of a [P, columns] tile of at most 128 x 128.

    Every second tile by DMA if allowed, the others on the Tensor engine, drained by Scalar (three in four) and Vector.
    """
    p, width = data.shape
    result = nl.ndarray((width, p), data.dtype, buffer=nl.sbuf)
    old = nisa.get_nc_version() < nisa.nc_version.gen3
    if old or (by_dma and turned_count % 2 == 0 and data.dtype != nl.float32):
        nisa.dma_transpose(dst=result, src=data)
        return result
    bank = nl.ndarray((width, p), data.dtype, buffer=nl.psum)
    nisa.nc_transpose(dst=bank, data=data, engine=nisa.engine.tensor)
    if (turned_count // 2) % 4 == 0:
        nisa.tensor_copy(dst=result, src=bank)
    else:
        nisa.activation(dst=result, op=nl.copy, data=bank)
    return result


def finite_part(v):
    """(v with 0 for what is not finite, 1 where v is NaN or +inf, 1 where v is NaN or -inf), all in v's dtype."""
    difference = nl.ndarray(v.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=difference, data1=v, data2=v, op=nl.subtract, engine=nisa.engine.gpsimd)
    finite = nl.ndarray(v.shape, nl.uint8, buffer=nl.sbuf)
    zero = constant(v.shape[0], v.shape[1], 0.0, nl.float32)
    nisa.tensor_tensor(dst=finite, data1=difference, data2=zero, op=nl.equal, engine=nisa.engine.gpsimd)
    clean = nl.ndarray(v.shape, v.dtype, buffer=nl.sbuf)
    nisa.memset(dst=clean, value=0.0, engine=nisa.engine.gpsimd)
    nisa.tensor_copy_predicated(dst=clean, src=v, predicate=finite)
    plus = nl.ndarray(v.shape, v.dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=plus,
        data=v,
        op0=nl.less_equal,
        operand0=FLOAT32_MAX,
        op1=nl.subtract,
        operand1=1.0,
        reverse1=True,
    )
    minus = nl.ndarray(v.shape, v.dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=minus,
        data=v,
        op0=nl.greater_equal,
        operand0=-FLOAT32_MAX,
        op1=nl.subtract,
        operand1=1.0,
        reverse1=True,
    )
    return clean, plus, minus


def _add_infinities(total, counts_psum, op):
    """total +- infinity where the count is positive."""
    term = nl.ndarray(total.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=term, data=counts_psum, op0=nl.multiply, operand0=FLOAT32_MAX, op1=nl.multiply, operand1=FLOAT32_MAX
    )
    nisa.tensor_tensor(dst=total, data1=total, data2=term, op=op, engine=nisa.engine.gpsimd)


def load_values(value, k0, k1, keys_across, options):
    """The chunks of a section: (values [rows, dv], first column, column step, keys from, keys to).

    Runs of span keys are spread over the partitions: key p * step + c of a run is row p of its chunk c, so that each
    partition reads step * dv contiguous values.
    """
    dv, span = value.shape[1], min(options["span"], k1 - k0)
    if span % 128 > 0:
        span = 128
    runs = (k1 - k0) // span
    step = span // 128
    chunks = []
    if runs > 0:
        stop = k0 + runs * span
        tile_sbuf = nl.ndarray((128, runs * step * dv), value.dtype, buffer=nl.sbuf)
        nisa.dma_copy(
            dst=tile_sbuf.reshape((128, runs, step * dv)),
            src=value[k0:stop].reshape((runs, 128, step * dv)).permute((1, 0, 2)),
        )
        tile_sbuf = drop_past_end(tile_sbuf, k0, [[span, runs], [1, step]], step, dv, keys_across, options)
        for i in range(runs):
            for c in range(step):
                at = (i * step + c) * dv
                first = i * span + c
                chunks.append((tile_sbuf[:, at : at + dv], first, step, k0 + i * span, k0 + i * span + span))
    for c in range(k0 + runs * span, k1, 128):
        stop = min(k1, c + 128)
        tile_sbuf = nl.ndarray((stop - c, dv), value.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile_sbuf, src=value[c:stop])
        tile_sbuf = drop_past_end(tile_sbuf, c, [[1, 1]], 1, dv, keys_across, options)
        chunks.append((tile_sbuf, c - k0, 1, c, stop))
    return chunks


def drop_past_end(tile_sbuf, k0, pattern, step, dv, keys_across, options):
    """Rows at or past the sequence's end become 0: nobody wrote them. The keys of row p are k0 + p * step + pattern."""
    if not options["has_seqlens"]:
        return tile_sbuf
    p, width = tile_sbuf.shape
    chunks = width // dv
    key = nl.ndarray((p, chunks), nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=key, pattern=pattern, offset=k0, channel_multiplier=step)
    valid = nl.ndarray((p, chunks), nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=valid, data=key, op0=nl.less, operand0=keys_across[0:p])
    kept = constant(p, width, 0.0, tile_sbuf.dtype)
    nisa.tensor_copy_predicated(
        dst=kept.reshape((p, chunks, dv)),
        src=tile_sbuf.reshape((p, chunks, dv)),
        predicate=valid.expand_dim(2).broadcast(2, dv),
    )
    return kept


def load_keys(key, k0, k1):
    """K^T pieces of one section: [d up to 128, keys] for each 128 of the head dim."""
    tiles = []
    d = key.shape[1]
    for d0 in range(0, d, 128):
        tiles.append(load_contraction(key, True, d0, min(d, d0 + 128), k0, k1))
    return tiles


def _keep(k0, k1, q0, q1, b, h, heads, dropout_keys, options):
    """Dropout's mask of queries [q0, q1) and keys [k0, k1); packed, of the group's heads and query 0."""
    p, width = q1 - q0, k1 - k0
    packed = options["packed"]
    if packed:
        row0 = (b * heads + h) * options["group"] + q0
        return keep_tile(p, width, k0, 0, row0, packed, dropout_keys, options["threshold"])
    return keep_tile(p, width, k0, q0, b * heads + h, packed, dropout_keys, options["threshold"])


@nki.jit
def attention_kernel(query, key, value, mask, sinks, slopes, seqlens, seed, options):
    """query [B, hq, sq, d], key [B, hk, sk, d], value [B, hk, sk, dv], mask [B|1, hq|1, sq|1, sk], sinks and slopes
    [heads, 1], seqlens [B, 1] int32, seed [1, 2] int32 -> out [B, hq, sq, dv], lse [B, hq, sq, 1].
    """
    batch, heads, sq, d = query.shape
    kv_heads, sk, dv = key.shape[1], key.shape[2], value.shape[3]
    group = heads // kv_heads
    out_hbm = nl.ndarray((batch, heads, sq, dv), query.dtype, buffer=nl.shared_hbm)
    lse_hbm = nl.ndarray((batch, heads, sq, 1), nl.float32, buffer=nl.shared_hbm)
    sections = range(0, sk, SECTION)
    resident = sk * (((d + 127) // 128) + (dv + 127) // 128) * query.dtype.itemsize <= RESIDENT_BYTES
    dropout_keys = 0
    if options["has_dropout"]:
        dropout_keys = philox_keys(seed)
    pairs = batch * kv_heads
    pair_range = (0, pairs)
    tile_first, tile_step = 0, 1
    if pairs > 1:
        pair_range = my_tiles(pairs, 1)
    elif nl.num_programs(0) == 2:
        tile_first, tile_step = nl.program_id(0), 2
    for pair in range(pair_range[0], pair_range[1]):
        b, kv = pair // kv_heads, pair % kv_heads
        keys_across = column(128)
        if options["has_seqlens"]:
            lengths = load_across(seqlens[b : b + 1], 128, 0, 1, nl.int32)
            nisa.tensor_copy(dst=keys_across, src=lengths)
            nisa.tensor_scalar(
                dst=keys_across,
                data=keys_across,
                op0=nl.maximum,
                operand0=0.0,
                op1=nl.minimum,
                operand1=float(sk),
            )
        held = []
        if resident:
            for k0 in sections:
                k1 = min(sk, k0 + SECTION)
                held.append((load_keys(key[b, kv], k0, k1), load_values(value[b, kv], k0, k1, keys_across, options)))
        for h in range(kv * group, kv * group + group):
            for t in range(tile_first, (sq + 127) // 128, tile_step):
                q0 = t * 128
                q1 = min(sq, q0 + 128)
                _query_tile(
                    query, key, value, mask, sinks, slopes, options, out_hbm, lse_hbm, b, h, kv, q0, q1, keys_across,
                    held, resident, dropout_keys,
                )  # fmt: skip
    return out_hbm, lse_hbm


def _query_tile(
    query, key, value, mask, sinks, slopes, options, out_hbm, lse_hbm, b, h, kv, q0, q1, keys_across, held, resident,
    dropout_keys,
):  # fmt: skip
    sk, d, dv = key.shape[2], key.shape[3], value.shape[3]
    sq = options["queries"]
    p = q1 - q0
    q_tiles = []
    for d0 in range(0, d, 128):
        q_tiles.append(load_contraction(query[b, h], True, d0, min(d, d0 + 128), q0, q1))
    position, low, high = query_bounds(q0 * options["row_step"], p, sq, sk, keys_across, options)
    slope = position
    if options["has_alibi"]:
        slope = head_column(slopes, b, h, p, options)
    minus_top = constant(p, 1, -FLOOR, nl.float32)
    total = constant(p, 1, 0.0, nl.float32)
    if options["has_sinks"]:
        sink = head_column(sinks, b, h, p, options)
        nisa.tensor_scalar(
            dst=minus_top, data=sink, op0=nl.maximum, operand0=FLOOR, op1=nl.multiply, operand1=-1.0
        )
        nisa.activation(dst=total, op=nl.exp, data=sink, bias=minus_top)
    acc = constant(p, dv, 0.0, nl.float32)
    lowest = constant(p, 1, FLOAT32_MIN, nl.float32)
    best = constant(p, 1, FLOAT32_MIN, nl.float32)  # of all scores: stays if the row sees nothing
    natural = options["natural"]
    factor = 1.0 if natural else options["scale"]
    turned_count = 0
    for s in range((sk + SECTION - 1) // SECTION):
        k0 = s * SECTION
        k1 = min(sk, k0 + SECTION)
        blocks = []
        for c in range(k0, k1, 512):
            stop = min(k1, c + 512)
            kind = block_kind(c, stop, q0, q1, sq, sk, options)
            blocks.append((c, stop, kind))
        seen = []
        for block in blocks:
            if block[2] > 0:
                seen.append(block)
        if len(seen) == 0:
            continue
        if resident:
            k_tiles, v_chunks = held[s]
        else:
            k_tiles = load_keys(key[b, kv], k0, k1)
            v_chunks = load_values(value[b, kv], k0, k1, keys_across, options)
        tops = nl.ndarray((p, len(seen)), nl.float32, buffer=nl.sbuf)
        scores = []
        for i in range(len(seen)):
            start, stop, kind = seen[i]
            score = products(q_tiles, k_tiles, start - k0, stop - k0)
            if natural:
                mask_sbuf = score
                if options["has_mask"]:
                    mask_sbuf = load_mask(mask, b, h, q0, q1, start, stop)
                score = natural_scores(score, start, position, slope, mask_sbuf, options)
            if kind == 2:
                shown = nl.ndarray((p, stop - start), nl.float32, buffer=nl.sbuf)
                hide(shown, score, start, low, high, tops[:, i : i + 1])
                score = shown
            else:
                nisa.tensor_reduce(dst=tops[:, i : i + 1], op=nl.maximum, data=score, axis=1)
            scores.append(score)
        minus_best = column(p)
        nisa.tensor_reduce(dst=minus_best, op=nl.maximum, data=tops, axis=1, negate=True)
        if options["has_sinks"]:
            nisa.scalar_tensor_tensor(
                dst=best, data=minus_best, op0=nl.multiply, operand0=-1.0, op1=nl.maximum, operand1=best
            )
        new_minus_top = column(p)
        nisa.tensor_scalar(
            dst=new_minus_top,
            data=minus_best,
            op0=nl.multiply,
            operand0=factor,
            op1=nl.minimum,
            operand1=minus_top,
        )
        shrink = column(p)
        nisa.activation(dst=shrink, op=nl.exp, data=minus_top, scale=-1.0, bias=new_minus_top)
        minus_top = new_minus_top
        power = nl.ndarray((p, k1 - k0), query.dtype, buffer=nl.sbuf)
        lost = visible = power
        if options["has_dropout"]:
            lost = nl.ndarray((p, k1 - k0), query.dtype, buffer=nl.sbuf)
        if options["has_mask"] or options["per_query_bounds"]:
            visible = nl.ndarray((p, k1 - k0), query.dtype, buffer=nl.sbuf)
        part = column(p)
        for i in range(len(seen)):
            start, stop, kind = seen[i]
            how = nisa.reduce_cmd.reset_reduce if i == 0 else nisa.reduce_cmd.reduce
            nisa.activation(
                dst=power[:, start - k0 : stop - k0],
                op=nl.exp,
                data=scores[i],
                scale=factor,
                bias=minus_top,
                reduce_op=nl.add,
                reduce_res=part,
                reduce_cmd=how,
            )
            if options["has_mask"] or (kind == 2 and options["per_query_bounds"]):
                nisa.tensor_tensor(
                    dst=visible[:, start - k0 : stop - k0],
                    data1=scores[i],
                    data2=lowest.broadcast(1, stop - start),
                    op=nl.not_equal,
                    engine=nisa.engine.gpsimd,
                )
            if options["has_dropout"]:
                keep = _keep(start, stop, q0, q1, b, h, query.shape[1], dropout_keys, options)
                here = power[:, start - k0 : stop - k0]
                if options["has_mask"] or (kind == 2 and options["per_query_bounds"]):
                    nisa.scalar_tensor_tensor(
                        dst=lost[:, start - k0 : stop - k0],
                        data=keep,
                        op0=nl.subtract,
                        operand0=1.0,
                        reverse0=True,
                        op1=nl.multiply,
                        operand1=visible[:, start - k0 : stop - k0],
                    )
                nisa.tensor_tensor(dst=here, data1=here, data2=keep, op=nl.multiply)
        nisa.scalar_tensor_tensor(
            dst=total, data=total, op0=nl.multiply, operand0=shrink, op1=nl.add, operand1=part
        )
        out_psum = nl.ndarray((p, dv), nl.float32, buffer=nl.psum)
        plus_psum = minus_psum = out_psum
        guards = 0
        for v, first, step, k_first, k_last in v_chunks:
            kind = block_kind(k_first, k_last, q0, q1, sq, sk, options)
            if kind == 0:
                continue
            rows = v.shape[0]
            turned = turn(power[:, first : first + (rows - 1) * step + 1 : step], turned_count, p > 64)
            turned_count += 1
            if options["has_mask"] or (kind == 2 and options["per_query_bounds"]):
                if guards == 0:
                    plus_psum = nl.ndarray((p, dv), nl.float32, buffer=nl.psum)
                    minus_psum = nl.ndarray((p, dv), nl.float32, buffer=nl.psum)
                guards += 1
                clean, plus, minus = finite_part(v)
                seeing = turn(visible[:, first : first + (rows - 1) * step + 1 : step], 0, p > 64)
                nisa.nc_matmul(dst=out_psum, stationary=turned, moving=clean)
                nisa.nc_matmul(dst=plus_psum, stationary=seeing, moving=plus)
                nisa.nc_matmul(dst=minus_psum, stationary=seeing, moving=minus)
                if options["has_dropout"]:  # a dropped weight is 0, and 0 * infinity is NaN: +infinity - infinity
                    either = nl.ndarray(v.shape, v.dtype, buffer=nl.sbuf)
                    nisa.tensor_tensor(dst=either, data1=plus, data2=minus, op=nl.add)
                    turned_lost = turn(lost[:, first : first + (rows - 1) * step + 1 : step], 0, p > 64)
                    nisa.nc_matmul(dst=plus_psum, stationary=turned_lost, moving=either)
                    nisa.nc_matmul(dst=minus_psum, stationary=turned_lost, moving=either)
            else:
                nisa.nc_matmul(dst=out_psum, stationary=turned, moving=v)
        nisa.scalar_tensor_tensor(
            dst=acc, data=acc, op0=nl.multiply, operand0=shrink, op1=nl.add, operand1=out_psum
        )
        if guards > 0:
            _add_infinities(acc, plus_psum, nl.add)
            _add_infinities(acc, minus_psum, nl.subtract)
    inverse = column(p)
    nisa.tensor_scalar(dst=inverse, data=total, op0=nl.maximum, operand0=1.0e-37)
    nisa.reciprocal(dst=inverse, data=inverse)
    if options["has_sinks"]:  # a row that sees nothing is 0, whatever the sink is
        nothing = nl.ndarray((p, 1), nl.uint8, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=nothing, data=best, op0=nl.equal, operand0=FLOAT32_MIN)
        nisa.tensor_copy_predicated(dst=inverse, src=0.0, predicate=nothing)
        nisa.tensor_copy_predicated(dst=acc, src=0.0, predicate=nothing.broadcast(1, dv))
    out = nl.ndarray((p, dv), query.dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=out, data=acc, op0=nl.multiply, operand0=inverse, op1=nl.multiply, operand1=options["keep_scale"]
    )
    nisa.dma_copy(dst=out_hbm[b, h, q0:q1], src=out)
    lse = column(p)
    nisa.activation(dst=lse, op=nl.log, data=total)
    nisa.tensor_tensor(dst=lse, data1=lse, data2=minus_top, op=nl.subtract)
    nisa.dma_copy(dst=lse_hbm[b, h, q0:q1], src=lse)


def options_of(
    query, key, attn_mask, sinks, alibi_slopes, seqlens_k, *, is_causal, scale, bottom_right, window_left, window_right,
    softcap, dropout_p, packed,
):  # fmt: skip
    """The static choices of both attention kernels."""
    group = query.shape[-3] // key.shape[-3]
    per_query = bool(is_causal) or window_left >= 0 or window_right >= 0
    steady = 1e-4 <= scale <= 1e4  # else the lowest float32 times scale is no safe filling
    return {
        "is_causal": bool(is_causal),
        "scale": float(scale),
        "bottom_right": bool(bottom_right),
        "window_left": int(window_left),
        "window_right": int(window_right),
        "softcap": float(softcap),
        "has_mask": attn_mask is not None,
        "float_mask": attn_mask is not None and dtype_name(attn_mask) in FLOATS,
        "has_sinks": sinks is not None,
        "has_alibi": alibi_slopes is not None,
        "has_seqlens": seqlens_k is not None,
        "per_query_bounds": per_query,
        "natural": softcap > 0 or alibi_slopes is not None or attn_mask is not None or not steady,
        "span": 128 if per_query or attn_mask is not None else SECTION,
        "has_dropout": dropout_p > 0,
        "threshold": math.ceil(dropout_p * 2**24),
        "keep_scale": 1.0 / (1.0 - dropout_p),
        "packed": packed,
        "group": group,
        "row_step": 0 if packed else 1,
        "queries": 1 if packed else query.shape[-2],
    }


def supports(
    query, key, value, attn_mask=None, sinks=None, alibi_slopes=None, seqlens_k=None, dropout_seed=None, **rest
):
    given = {"query": query, "key": key, "value": value, "sinks": sinks, "alibi_slopes": alibi_slopes}
    for name, size in (("head_dim", query.shape[-1]), ("value head_dim", value.shape[-1])):
        if size > 512:
            return f"{name} of {size}; the kernel takes at most 512 (one PSUM bank)"
    if attn_mask is not None and dtype_name(attn_mask) not in (*FLOATS, "bool"):
        return f"attn_mask is {dtype_name(attn_mask)}; the NKI kernels take bool, {', '.join(FLOATS)}"
    return refuse_dtypes(given) or refuse_empty({**given, "attn_mask": attn_mask})


def heads_of(x):
    """[B.., h, s, d] as dense [B, h, s, d]."""
    return dense(x).reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def vector_of(x):
    return None if x is None else dense(x).reshape(x.shape[0], 1)


def run(
    query, key, value, attn_mask=None, sinks=None, alibi_slopes=None, seqlens_k=None, dropout_seed=None, *, is_causal,
    scale, bottom_right, window_left, window_right, softcap, dropout_p=0.0, outs=None, cores=1,
):  # fmt: skip
    """out and lse of arrays in the kernel form."""
    shape = tuple(query.shape)
    group = shape[-3] // key.shape[-3]
    packed = shape[-2] == 1 and 1 < group <= 128
    options = options_of(
        query, key, attn_mask, sinks, alibi_slopes, seqlens_k, is_causal=is_causal, scale=scale,
        bottom_right=bottom_right, window_left=window_left, window_right=window_right, softcap=softcap,
        dropout_p=dropout_p, packed=packed,
    )  # fmt: skip
    q, k, v = heads_of(query), heads_of(key), heads_of(value)
    mask = None if attn_mask is None else squeezed_mask(attn_mask)
    if packed:
        q = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], k.shape[1], group, mask.shape[3])
    if mask is not None and not options["float_mask"]:
        mask = as_bytes(mask)
    lengths = None if seqlens_k is None else as_int32(dense(seqlens_k)).reshape(q.shape[0], 1)
    out, lse = attention_kernel[cores](
        q, k, v, mask, vector_of(sinks), vector_of(alibi_slopes), lengths, as_words(dropout_seed), options
    )
    return {"out": out.reshape((*shape[:-1], value.shape[-1])), "lse": lse.reshape(shape[:-1])}
