"""Gradients of attention from the saved output and log-sum-exp (Dao et al. 2022, algorithm 4).

Query tiles of 128 in the outer loop, key blocks of 512 inside. Scores are taken again; P = exp(score - lse), dS = P
* (dO v^T - D) with D = sum(dO * out) - grad_lse. grad_key and grad_value of one key/value head stay in SBUF in
float32 while all query tiles of its group pass, as many keys at a time as fit SBUF_BYTES; with several such sections,
or with two cores that share one head's keys, grad_query adds up in HBM in float32. P and dS have queries on
partitions, so their products with dO and q need no transpose; only dS is turned for grad_query. Hidden pairs are set
to exactly 0 in P and dS, and where some pairs of a block are hidden, what is not finite in dO, q and k is kept from
meeting those zeros.
"""

# Plain loops with append: the parser front end takes a subset of Python.
# ruff: noqa: PERF401

import nki
import nki.isa as nisa
import nki.language as nl

from ._arrays import as_bytes, as_int32, as_words, dense, dtype_name, squeezed_mask
from ._philox import philox_keys
from ._tiles import DTYPES, add_other_core, column, constant, load, load_across, my_tiles, sum_partitions
from .attention import (
    FLOOR,
    _add_infinities,
    _keep,
    block_kind,
    drop_past_end,
    finite_part,
    head_column,
    heads_of,
    hidden_by_mask,
    load_mask,
    natural_scores,
    options_of,
    products,
    query_bounds,
    turn,
    vector_of,
)
from .attention import supports as supports_forward
from .matmul import load_contraction

SBUF_BYTES = 131072
QUERY_TILES = 4  # share a PSUM bank for their part of a key chunk's gradients: a fourth of the additions


def _zero_outside(tile_sbuf, k0, low, high):
    """0 where the key is outside [low, high)."""
    p, width = tile_sbuf.shape
    key = nl.ndarray((p, width), nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=key, pattern=[[1, width]], offset=k0, channel_multiplier=0)
    out = nl.ndarray((p, width), nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=out, data=key, op0=nl.less, operand0=low)
    nisa.tensor_copy_predicated(dst=tile_sbuf, src=0.0, predicate=out)
    nisa.tensor_scalar(dst=out, data=key, op0=nl.greater_equal, operand0=high)
    nisa.tensor_copy_predicated(dst=tile_sbuf, src=0.0, predicate=out)


def _contractions(src, k0, k1):
    """[d up to 128, rows] pieces of src [rows, d]."""
    tiles = []
    for d0 in range(0, src.shape[1], 128):
        tiles.append(load_contraction(src, True, d0, min(src.shape[1], d0 + 128), k0, k1))
    return tiles


def _add_guarded(held, left, parts):
    """held += left^T right, where zeros of left meet only finite values: parts is finite_part(right)."""
    clean, plus, minus = parts
    bank = nl.ndarray(held.shape, nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=bank, stationary=left, moving=clean)
    plus_psum = nl.ndarray(held.shape, nl.float32, buffer=nl.psum)
    minus_psum = nl.ndarray(held.shape, nl.float32, buffer=nl.psum)
    # The sign of left decides the sign of its infinity: positive and negative parts go separately.
    up = nl.ndarray(left.shape, left.dtype, buffer=nl.sbuf)
    down = nl.ndarray(left.shape, left.dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=up, data=left, op0=nl.greater, operand0=0.0)
    nisa.tensor_scalar(dst=down, data=left, op0=nl.less, operand0=0.0)
    nisa.nc_matmul(dst=plus_psum, stationary=up, moving=plus)
    nisa.nc_matmul(dst=plus_psum, stationary=down, moving=minus)
    nisa.nc_matmul(dst=minus_psum, stationary=up, moving=minus)
    nisa.nc_matmul(dst=minus_psum, stationary=down, moving=plus)
    nisa.tensor_tensor(dst=held, data1=held, data2=bank, op=nl.add)
    _add_infinities(held, plus_psum, nl.add)
    _add_infinities(held, minus_psum, nl.subtract)


def _query_tile(query, grad_out, out, lse, grad_lse, slopes, b, h, q0, q1, sk, keys_across, options):
    """What the passes of one query tile over the keys share."""
    p, dv = q1 - q0, grad_out.shape[3]
    do_rows = load(grad_out[b, h, q0:q1], grad_out.dtype)
    o_rows = load(out[b, h, q0:q1], out.dtype)
    own_lse = load(lse[b, h, q0:q1], nl.float32)
    product = nl.ndarray((p, dv), nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=product, data1=do_rows, data2=o_rows, op=nl.multiply)
    dot = column(p)
    nisa.tensor_reduce(dst=dot, op=nl.add, data=product, axis=1)
    if options["has_grad_lse"]:
        upstream = load(grad_lse[b, h, q0:q1], nl.float32)
        nisa.tensor_tensor(dst=dot, data1=dot, data2=upstream, op=nl.subtract)
    minus_lse = column(p)
    nisa.tensor_scalar(
        dst=minus_lse, data=own_lse, op0=nl.maximum, operand0=FLOOR, op1=nl.multiply, operand1=-1.0
    )
    position, low, high = query_bounds(q0, p, query.shape[2], sk, keys_across, options)
    slope = position
    if options["has_alibi"]:
        slope = head_column(slopes, b, h, p, options)
    q_rows = load(query[b, h, q0:q1], query.dtype)
    q_parts = do_parts = (q_rows, q_rows, q_rows)
    if options["has_mask"] or options["per_query_bounds"]:
        q_parts, do_parts = finite_part(q_rows), finite_part(do_rows)
    return {
        "q0": q0,
        "q1": q1,
        "q_turned": _contractions(query[b, h], q0, q1),
        "o_turned": _contractions(grad_out[b, h], q0, q1),
        "q_rows": q_rows,
        "q_parts": q_parts,
        "do_rows": do_rows,
        "do_parts": do_parts,
        "dot": dot,
        "minus_lse": minus_lse,
        "position": position,
        "low": low,
        "high": high,
        "slope": slope,
        "grad_q": constant(p, query.shape[3], 0.0, nl.float32),
    }


def _add_sink_gradient(sink_sums, tile, sinks, b, h, options):
    """sink_sums[:, h] -= exp(sink - lse) * D of these rows."""
    p = tile["q1"] - tile["q0"]
    sink = head_column(sinks, b, h, p, options)
    weight = column(p)
    nisa.activation(dst=weight, op=nl.exp, data=sink, bias=tile["minus_lse"])
    nisa.tensor_tensor(dst=weight, data1=weight, data2=tile["dot"], op=nl.multiply)
    held = sink_sums[0:p, h : h + 1]
    nisa.tensor_tensor(dst=held, data1=held, data2=weight, op=nl.subtract)


def _hide(tile_sbuf, tile, k0, kind, mask_sbuf, options):
    """0 where a pair is hidden."""
    if kind == 2:
        _zero_outside(tile_sbuf, k0, tile["low"], tile["high"])
    if options["has_mask"]:
        nisa.tensor_copy_predicated(dst=tile_sbuf, src=0.0, predicate=hidden_by_mask(mask_sbuf))


def _block(
    tile, k_turned, v_turned, s0, k0, k1, kind, mask, grad_mask_hbm, b, h, heads, dropout_keys, mask_dtype, options
):
    """(P with dropout's factor, dS, tile, kind): the first two [queries, keys] in the operands' dtype."""
    q0, q1 = tile["q0"], tile["q1"]
    p, width = q1 - q0, k1 - k0
    dtype = tile["q_rows"].dtype
    score = products(tile["q_turned"], k_turned, k0 - s0, k1 - s0)
    raw = score
    mask_sbuf = score
    if options["has_mask"]:
        mask_sbuf = load_mask(mask, b, h, q0, q1, k0, k1)
    factor = options["scale"]
    if options["natural"]:
        score = natural_scores(raw, k0, tile["position"], tile["slope"], mask_sbuf, options)
        factor = 1.0
    power = nl.ndarray((p, width), nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=power, op=nl.exp, data=score, scale=factor, bias=tile["minus_lse"])
    _hide(power, tile, k0, kind, mask_sbuf, options)
    grad_p = products(tile["o_turned"], v_turned, k0 - s0, k1 - s0)
    low_power = nl.ndarray((p, width), dtype, buffer=nl.sbuf)
    if options["has_dropout"]:
        keep = _keep(k0, k1, q0, q1, b, h, heads, dropout_keys, options)
        grown = nl.ndarray((p, width), nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=grown, data=grad_p, op0=nl.multiply, operand0=options["keep_scale"])
        grad_p = constant(p, width, 0.0, nl.float32)
        nisa.tensor_copy_predicated(dst=grad_p, src=grown, predicate=keep)
        nisa.scalar_tensor_tensor(
            dst=low_power,
            data=power,
            op0=nl.multiply,
            operand0=options["keep_scale"],
            op1=nl.multiply,
            operand1=keep,
        )
    else:
        nisa.activation(dst=low_power, op=nl.copy, data=power)
    hides = kind == 2 or options["has_mask"]
    direct = not hides and not options["need_mask"] and options["softcap"] == 0.0
    grad_s = nl.ndarray((p, width), dtype if direct else nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=grad_s, data=grad_p, op0=nl.subtract, operand0=tile["dot"], op1=nl.multiply, operand1=power
    )
    low_grad = grad_s
    if not direct:
        _hide(grad_s, tile, k0, kind, mask_sbuf, options)
        if options["need_mask"]:
            rounded = nl.ndarray((p, width), DTYPES[mask_dtype], buffer=nl.sbuf)
            nisa.tensor_copy(dst=rounded, src=grad_s)
            nisa.dma_copy(dst=grad_mask_hbm[b, h, q0:q1, k0:k1], src=rounded)
        if options["softcap"] > 0.0:
            bent = nl.ndarray((p, width), nl.float32, buffer=nl.sbuf)
            nisa.activation(dst=bent, op=nl.tanh, data=raw, scale=options["scale"] / options["softcap"])
            nisa.tensor_tensor(dst=bent, data1=bent, data2=bent, op=nl.multiply)
            nisa.tensor_scalar(dst=bent, data=bent, op0=nl.subtract, operand0=1.0, reverse0=True)
            nisa.tensor_tensor(dst=grad_s, data1=grad_s, data2=bent, op=nl.multiply)
            _hide(grad_s, tile, k0, kind, mask_sbuf, options)
        low_grad = nl.ndarray((p, width), dtype, buffer=nl.sbuf)
        nisa.activation(dst=low_grad, op=nl.copy, data=grad_s)
    return low_power, low_grad, tile, kind


def _chunk_kind(part, c, stop, sk, options):
    """0: hidden from all queries of the part, 1: nothing to guard, 2: some pairs may be hidden."""
    tile, kind = part[2], part[3]
    if kind == 2:
        kind = block_kind(c, stop, tile["q0"], tile["q1"], options["queries"], sk, options)
    if kind == 0:
        return 0
    return 2 if options["has_mask"] or (kind == 2 and options["per_query_bounds"]) else 1


def _add_chunk(parts, k0, c, stop, grad_v, grad_k, sk, options):
    """Add what the parts of the block from key k0 give the keys [c, stop); those without a guard at once."""
    whole = []
    for part in parts:
        kind = _chunk_kind(part, c, stop, sk, options)
        if kind == 2:
            _add_guarded(grad_v, part[0][:, c - k0 : stop - k0], part[2]["do_parts"])
            _add_guarded(grad_k, part[1][:, c - k0 : stop - k0], part[2]["q_parts"])
        elif kind == 1:
            whole.append(part)
    if len(whole) == 0:
        return
    v_psum = nl.ndarray(grad_v.shape, nl.float32, buffer=nl.psum)
    k_psum = nl.ndarray(grad_k.shape, nl.float32, buffer=nl.psum)
    for part in whole:
        nisa.nc_matmul(dst=v_psum, stationary=part[0][:, c - k0 : stop - k0], moving=part[2]["do_rows"])
        nisa.nc_matmul(dst=k_psum, stationary=part[1][:, c - k0 : stop - k0], moving=part[2]["q_rows"])
    nisa.tensor_tensor(dst=grad_v, data1=grad_v, data2=v_psum, op=nl.add)
    nisa.tensor_tensor(dst=grad_k, data1=grad_k, data2=k_psum, op=nl.add)


def _add_query_gradient(part, k_rows, s0, k0, k1, sk, options):
    """grad_q += dS k over the block [k0, k1) of the section from s0."""
    low_grad = part[1]
    grad_q = part[2]["grad_q"]
    q_psum = nl.ndarray(grad_q.shape, nl.float32, buffer=nl.psum)
    plain = 0
    for c in range(k0, k1, 128):
        stop = min(k1, c + 128)
        kind = _chunk_kind(part, c, stop, sk, options)
        chunk = (c - s0) // 128
        if kind > 0:
            turned = turn(low_grad[:, c - k0 : stop - k0], chunk, True)
            if kind == 2:
                _add_guarded(grad_q, turned, finite_part(k_rows[chunk]))
            else:
                plain += 1
                nisa.nc_matmul(dst=q_psum, stationary=turned, moving=k_rows[chunk])
    if plain > 0:
        nisa.tensor_tensor(dst=grad_q, data1=grad_q, data2=q_psum, op=nl.add)


def _store_scaled(dst_hbm, held, scale):
    result = nl.ndarray(held.shape, dst_hbm.dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=result, data=held, op0=nl.multiply, operand0=scale)
    nisa.dma_copy(dst=dst_hbm, src=result)


@nki.jit
def attention_backward_kernel(
    grad_out, grad_lse, query, key, value, mask, sinks, slopes, seqlens, seed, out, lse, options, mask_dtype,
    sinks_dtype,
):  # fmt: skip
    """Shapes as in attention_kernel; grad_lse and lse [B, hq, sq, 1]. Returns grad_query, grad_key, grad_value, then
    grad_mask [B, hq, sq, sk] and grad_sinks [1, hq] where wanted.
    """
    batch, heads, sq, d = query.shape
    kv_heads, sk, dv = key.shape[1], key.shape[2], value.shape[3]
    group = heads // kv_heads
    grad_q_hbm = nl.ndarray(query.shape, query.dtype, buffer=nl.shared_hbm)
    grad_k_hbm = nl.ndarray(key.shape, key.dtype, buffer=nl.shared_hbm)
    grad_v_hbm = nl.ndarray(value.shape, value.dtype, buffer=nl.shared_hbm)
    results = [grad_q_hbm, grad_k_hbm, grad_v_hbm]
    grad_mask_hbm = grad_q_hbm
    if options["need_mask"]:
        grad_mask_hbm = nl.ndarray((batch, heads, sq, sk), DTYPES[mask_dtype], buffer=nl.shared_hbm)
        results.append(grad_mask_hbm)
    grad_sinks_hbm = grad_q_hbm
    sink_sums = column(128)
    if options["need_sinks"]:
        grad_sinks_hbm = nl.ndarray((1, heads), DTYPES[sinks_dtype], buffer=nl.shared_hbm)
        results.append(grad_sinks_hbm)
        sink_sums = constant(128, heads, 0.0, nl.float32)
    dropout_keys = 0
    if options["has_dropout"]:
        dropout_keys = philox_keys(seed)
    first, last = my_tiles(batch * kv_heads, 1)
    section = options["section"]
    # One head for two cores: each takes half of the keys.
    split = batch * kv_heads == 1 and nl.num_programs(0) == 2 and sk > 512
    key_first, key_last = 0, sk
    mine = 0
    if split:
        first, last = 0, 1
        mine = nl.program_id(0)
        half = (sk + 1023) // 1024 * 512
        if mine == 0:
            key_last = half
        else:
            key_first = half
    partial_hbm = grad_q_hbm
    if split:
        partial_hbm = nl.ndarray((2, heads, sq, d), nl.float32, buffer=nl.shared_hbm)
    elif sk > section:
        partial_hbm = nl.ndarray((1, heads, sq, d), nl.float32, buffer=nl.private_hbm)
    for pair in range(first, last):
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
        for s0 in range(key_first, key_last, section):
            s1 = min(key_last, s0 + section)
            k_turned = _contractions(key[b, kv], s0, s1)
            v_turned = _contractions(value[b, kv], s0, s1)
            k_rows = []
            grad_k = []
            grad_v = []
            for c in range(s0, s1, 128):
                stop = min(s1, c + 128)
                k_rows.append(
                    drop_past_end(load(key[b, kv, c:stop], key.dtype), c, [[1, 1]], 1, d, keys_across, options)
                )
                grad_k.append(constant(stop - c, d, 0.0, nl.float32))
                grad_v.append(constant(stop - c, dv, 0.0, nl.float32))
            for h in range(kv * group, kv * group + group):
                for q_first in range(0, sq, 128 * QUERY_TILES):
                    tiles = []
                    for q0 in range(q_first, min(sq, q_first + 128 * QUERY_TILES), 128):
                        tile = _query_tile(
                            query, grad_out, out, lse, grad_lse, slopes, b, h, q0, min(sq, q0 + 128), sk, keys_across,
                            options,
                        )  # fmt: skip
                        if options["need_sinks"] and s0 == 0:
                            _add_sink_gradient(sink_sums, tile, sinks, b, h, options)
                        tiles.append(tile)
                    for k0 in range(s0, s1, 512):
                        k1 = min(s1, k0 + 512)
                        parts = []
                        for tile in tiles:
                            kind = block_kind(k0, k1, tile["q0"], tile["q1"], sq, sk, options)
                            if kind > 0:
                                parts.append(
                                    _block(
                                        tile, k_turned, v_turned, s0, k0, k1, kind, mask, grad_mask_hbm, b, h, heads,
                                        dropout_keys, mask_dtype, options,
                                    )
                                )  # fmt: skip
                            elif options["need_mask"]:
                                zeros = constant(tile["q1"] - tile["q0"], k1 - k0, 0.0, DTYPES[mask_dtype])
                                nisa.dma_copy(dst=grad_mask_hbm[b, h, tile["q0"] : tile["q1"], k0:k1], src=zeros)
                        for c in range(k0, k1, 128):
                            chunk = (c - s0) // 128
                            _add_chunk(parts, k0, c, min(k1, c + 128), grad_v[chunk], grad_k[chunk], sk, options)
                        for part in parts:
                            _add_query_gradient(part, k_rows, s0, k0, k1, sk, options)
                    for tile in tiles:
                        grad_q, q0, q1 = tile["grad_q"], tile["q0"], tile["q1"]
                        if s0 > key_first:
                            earlier = load(partial_hbm[mine, h, q0:q1], nl.float32)
                            nisa.tensor_tensor(dst=grad_q, data1=grad_q, data2=earlier, op=nl.add)
                        if split or s1 < key_last:
                            nisa.dma_copy(dst=partial_hbm[mine, h, q0:q1], src=grad_q)
                        else:
                            _store_scaled(grad_q_hbm[b, h, q0:q1], grad_q, options["scale"])
            for c in range(s0, s1, 128):
                stop = min(s1, c + 128)
                _store_scaled(grad_k_hbm[b, kv, c:stop], grad_k[(c - s0) // 128], options["scale"])
                _store_scaled(grad_v_hbm[b, kv, c:stop], grad_v[(c - s0) // 128], 1.0)
    if split:
        nisa.core_barrier(data=partial_hbm, cores=(0, 1))
        for h in range(heads):
            for q0 in range(128 * mine, sq, 256):
                q1 = min(sq, q0 + 128)
                total_q = load(partial_hbm[0, h, q0:q1], nl.float32)
                other_q = load(partial_hbm[1, h, q0:q1], nl.float32)
                nisa.tensor_tensor(dst=total_q, data1=total_q, data2=other_q, op=nl.add)
                _store_scaled(grad_q_hbm[0, h, q0:q1], total_q, options["scale"])
    if options["need_sinks"]:
        total = nl.ndarray((1, heads), nl.float32, buffer=nl.sbuf)
        sum_partitions(total, sink_sums, constant(128, 1, 1.0, nl.float32))
        add_other_core(total, 0)
        if nl.program_id(0) == 0:
            nisa.dma_copy(dst=grad_sinks_hbm, src=total)
    return tuple(results)


def section_of(d, dv, size):
    """Keys that one section of SBUF_BYTES holds: turned keys and values, key rows, both gradients in float32."""
    pieces = -(-d // 128) + -(-dv // 128)
    each = 512 * pieces * size + 4 * (d * size + 4 * (d + dv))
    return max(1, SBUF_BYTES // each) * 512


def supports(
    grad_out, grad_lse=None, query=None, key=None, value=None, attn_mask=None, sinks=None, alibi_slopes=None,
    seqlens_k=None, dropout_seed=None, out=None, lse=None, **rest,
):  # fmt: skip
    return supports_forward(query, key, value, attn_mask, sinks, alibi_slopes, seqlens_k, dropout_seed, **rest)


def run(
    grad_out, grad_lse=None, query=None, key=None, value=None, attn_mask=None, sinks=None, alibi_slopes=None,
    seqlens_k=None, dropout_seed=None, out=None, lse=None, *, is_causal, scale, bottom_right, window_left, window_right,
    softcap, outs, dropout_p=0.0, cores=1,
):  # fmt: skip
    """`outs`: dtype names of the wanted gradients, None for the others."""
    options = options_of(
        query, key, attn_mask, sinks, alibi_slopes, seqlens_k, is_causal=is_causal, scale=scale,
        bottom_right=bottom_right, window_left=window_left, window_right=window_right, softcap=softcap,
        dropout_p=dropout_p, packed=False,
    )  # fmt: skip
    options["section"] = section_of(query.shape[-1], value.shape[-1], 4 if dtype_name(query) == "float32" else 2)
    options["need_mask"] = outs.get("grad_attn_mask") is not None
    options["need_sinks"] = outs.get("grad_sinks") is not None
    options["has_grad_lse"] = grad_lse is not None
    q, k, v = heads_of(query), heads_of(key), heads_of(value)
    mask = None if attn_mask is None else squeezed_mask(attn_mask)
    if mask is not None and not options["float_mask"]:
        mask = as_bytes(mask)
    lengths = None if seqlens_k is None else as_int32(dense(seqlens_k)).reshape(q.shape[0], 1)
    rows = (*q.shape[:3], 1)
    upstream = None if grad_lse is None else dense(grad_lse).reshape(rows)
    gradients = attention_backward_kernel[cores](
        heads_of(grad_out), upstream, q, k, v, mask, vector_of(sinks), vector_of(alibi_slopes), lengths,
        as_words(dropout_seed), heads_of(out), dense(lse).reshape(rows), options, outs.get("grad_attn_mask"),
        outs.get("grad_sinks"),
    )  # fmt: skip
    found = list(gradients)
    results = {
        "grad_query": found.pop(0).reshape(tuple(query.shape)),
        "grad_key": found.pop(0).reshape(tuple(key.shape)),
        "grad_value": found.pop(0).reshape(tuple(value.shape)),
    }
    if options["need_mask"]:
        results["grad_attn_mask"] = found.pop(0).reshape((*query.shape[:-1], key.shape[-2]))
    if options["need_sinks"]:
        results["grad_sinks"] = found.pop(0).reshape(query.shape[-3])
    return results


