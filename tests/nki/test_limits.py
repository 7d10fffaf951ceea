"""Every documented limit is refused one past its edge, with the instruction, the operand and the page; and what real
Neuron kernels do is not refused."""

from __future__ import annotations

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from isotile import nki_emulator
from isotile.nki_emulator import NkiValidationError
from isotile.nki_emulator import isa as nisa
from isotile.nki_emulator import language as nl

BF16 = nl.bfloat16


def sb(*shape, dtype=nl.float32):
    tile = nl.ndarray(shape, dtype, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=0 if tile.dtype.is_integer or tile.dtype.kind == "x" else 0.0)
    return tile


def ps(*shape, dtype=nl.float32):
    return nl.ndarray(shape, dtype, buffer=nl.psum)


def hbm(*shape, dtype=nl.float32):
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm)


def attempt(body, target):
    """Run `body` as a kernel on a target; "gen3x2" launches two cores."""

    def kernel():
        body()

    target, _, cores = target.partition("x")
    with nki_emulator.session(target):
        wrapped = nki_emulator.jit(kernel)
        nki_emulator.simulate(wrapped[2] if cores else wrapped)()


MX = nl.float8_e4m3fn_x4
DOUBLE = nisa.matmul_perf_mode.double_row
FP8 = nl.float8_e4m3
I32 = nl.int32
HWDGE = nisa.dge_mode.hwdge
CMD = nisa.reduce_cmd


def mm(dst, a, b, **kwargs):
    nisa.nc_matmul(dst=dst, stationary=a, moving=b, **kwargs)


def vec(dst, data, op0=nl.add, operand0=1.0, **kwargs):
    nisa.tensor_scalar(dst=dst, data=data, op0=op0, operand0=operand0, **kwargs)


def mx(m=32, n=32, p=32, pm=None, scale_rows=None):
    rows = scale_rows or p
    nisa.nc_matmul_mx(
        dst=ps(min(m, 128), n),
        stationary=sb(p, m, dtype=MX),
        moving=sb(pm or p, n, dtype=MX),
        stationary_scale=sb(rows, m, dtype=nl.uint8),
        moving_scale=sb(rows, n, dtype=nl.uint8),
    )


def rs(**kwargs):
    given = {
        "dst": sb(4, 8),
        "on_true_tile": sb(4, 8),
        "comp_op0": nl.greater_equal,
        "comp_op1": nl.less,
        "bound0": sb(4, 1),
        "bound1": sb(4, 1),
    }
    nisa.range_select(**{**given, **kwargs})


# (name, words of the message, target, refused call)
REFUSED = [
    ("partitions", "partition dim 129", "gen3", lambda: sb(129, 4)),
    ("rank", "at most 5 dims", "gen3", lambda: sb(4, 2, 2, 2, 2, 2)),
    ("one_dim", "at least 2 dims", "gen3", lambda: sb(4)),
    ("psum_bank", "2052 bytes", "gen3", lambda: ps(4, 513)),
    ("psum_all_banks", "16388 bytes", "gen4", lambda: ps(4, 4097)),
    ("sbuf_row_gen2", "usable", "gen2", lambda: sb(4, 176 * 256 + 1)),
    ("sbuf_row_gen3", "usable", "gen3", lambda: sb(4, 208 * 256 + 1)),
    ("sbuf_row_gen4", "usable", "gen4", lambda: sb(4, 240 * 256 + 1)),
    ("buffer_string", "buffer object", "gen3", lambda: nl.ndarray((4, 4), nl.float32, buffer="sbuf")),
    ("matmul_k_differs", "`stationary` has 64", "gen3", lambda: mm(ps(4, 4), sb(64, 4), sb(32, 4))),
    ("matmul_m", "free size 129 exceeds 128", "gen3", lambda: mm(ps(128, 4), sb(4, 129), sb(4, 4))),
    ("matmul_n", "free size 513 exceeds 512", "gen3", lambda: mm(ps(4, 512), sb(4, 4), sb(4, 513))),
    ("matmul_n_gen4", "4097 exceeds 4096", "gen4", lambda: mm(ps(4, 4096), sb(4, 4), sb(4, 4097))),
    (
        "matmul_n_gen4_bf16",
        "8193 exceeds 8192",
        "gen4",
        lambda: mm(ps(4, 8192, dtype=BF16), sb(4, 4, dtype=BF16), sb(4, 8193, dtype=BF16)),
    ),
    ("matmul_dst_sbuf", "must be in PSUM", "gen3", lambda: mm(sb(4, 4), sb(4, 4), sb(4, 4))),
    ("matmul_moving_psum", "must be in SBUF", "gen3", lambda: mm(ps(4, 4), sb(4, 4), ps(4, 4))),
    ("matmul_hbm", "must be on chip", "gen3", lambda: mm(ps(4, 4), sb(4, 4), hbm(4, 4))),
    ("matmul_mixed_fp32", "pair with each other only", "gen3", lambda: mm(ps(4, 4), sb(4, 4), sb(4, 4, dtype=BF16))),
    (
        "matmul_mixed_fp8",
        "do not mix",
        "gen4",
        lambda: mm(ps(4, 4), sb(4, 4, dtype=FP8), sb(4, 4, dtype=nl.float8_e4m3fn)),
    ),
    (
        "matmul_e4m3fn",
        "gen4",
        "gen3",
        lambda: mm(ps(4, 4), sb(4, 4, dtype=nl.float8_e4m3fn), sb(4, 4, dtype=nl.float8_e4m3fn)),
    ),
    ("matmul_int", "dtype int8", "gen3", lambda: mm(ps(4, 4), sb(4, 4, dtype=nl.int8), sb(4, 4, dtype=nl.int8))),
    ("matmul_dst_shape", r"is \[4, 8\]", "gen3", lambda: mm(ps(8, 4), sb(4, 4), sb(4, 8))),
    ("matmul_dst_bf16", "bfloat16", "gen3", lambda: mm(ps(4, 4, dtype=BF16), sb(4, 4), sb(4, 4))),
    ("matmul_tile_alone", "given together", "gen3", lambda: mm(ps(4, 4), sb(4, 4), sb(4, 4), tile_size=(64, 64))),
    (
        "matmul_tile_32_gen2",
        "row size",
        "gen2",
        lambda: mm(ps(4, 4), sb(4, 4), sb(4, 4), tile_size=(32, 128), tile_position=(0, 0)),
    ),
    (
        "matmul_tile_position",
        "multiple of 64",
        "gen3",
        lambda: mm(ps(4, 4), sb(4, 4), sb(4, 4), tile_size=(64, 64), tile_position=(32, 0)),
    ),
    (
        "matmul_tile_exceeded",
        "exceed the row size",
        "gen3",
        lambda: mm(ps(4, 4), sb(65, 4), sb(65, 4), tile_size=(64, 64), tile_position=(0, 0)),
    ),
    (
        "double_row_bf16",
        "double_row needs float8",
        "gen3",
        lambda: mm(ps(4, 4), sb(4, 2, 4, dtype=BF16), sb(4, 2, 4, dtype=BF16), perf_mode=DOUBLE),
    ),
    (
        "double_row_shape",
        r"\[K, 2, free\]",
        "gen3",
        lambda: mm(ps(4, 4), sb(4, 8, dtype=FP8), sb(4, 8, dtype=FP8), perf_mode=DOUBLE),
    ),
    (
        "double_row_columns",
        "column tiling",
        "gen3",
        lambda: mm(
            ps(4, 4),
            sb(4, 2, 4, dtype=FP8),
            sb(4, 2, 4, dtype=FP8),
            perf_mode=DOUBLE,
            tile_size=(128, 64),
            tile_position=(0, 0),
        ),
    ),
    ("perf_mode_string", "matmul_perf_mode", "gen3", lambda: mm(ps(4, 4), sb(4, 4), sb(4, 4), perf_mode="double_row")),
    ("mx_gen3", "gen4", "gen3", mx),
    ("mx_partitions", "multiple of 32", "gen4", lambda: mx(p=48, scale_rows=64)),
    ("mx_partitions_differ", "has 64 partitions", "gen4", lambda: mx(p=32, pm=64)),
    ("mx_stationary_odd", "even", "gen4", lambda: mx(m=31)),
    ("mx_stationary", "at most 128", "gen4", lambda: mx(m=130)),
    ("mx_scale_rows", "36 partitions", "gen4", lambda: mx(p=64, scale_rows=35)),
    (
        "quantize_source",
        "float16 or bfloat16",
        "gen4",
        lambda: nisa.quantize_mx(dst=sb(32, 1, dtype=MX), src=sb(32, 4), dst_scale=sb(32, 1, dtype=nl.uint8)),
    ),
    ("transpose_pe", "128 x 128", "gen3", lambda: nisa.nc_transpose(dst=ps(128, 128), data=sb(128, 129))),
    ("transpose_vector", "32 x 32", "gen3", lambda: nisa.nc_transpose(dst=sb(33, 32), data=sb(32, 33))),
    ("transpose_dtype", "data's dtype", "gen3", lambda: nisa.nc_transpose(dst=ps(4, 4), data=sb(4, 4, dtype=BF16))),
    ("transpose_shape", r"is \[8, 4\]", "gen3", lambda: nisa.nc_transpose(dst=ps(4, 8), data=sb(4, 8))),
    (
        "transpose_engine",
        "cannot run it",
        "gen3",
        lambda: nisa.nc_transpose(dst=ps(4, 4), data=sb(4, 4), engine=nisa.engine.scalar),
    ),
    (
        "both_psum",
        "both in PSUM",
        "gen3",
        lambda: nisa.tensor_tensor(dst=sb(4, 4), data1=ps(4, 4), data2=ps(4, 4), op=nl.add),
    ),
    (
        "no_broadcast",
        "not broadcast",
        "gen3",
        lambda: nisa.tensor_tensor(dst=sb(4, 4), data1=sb(4, 4), data2=sb(4, 1), op=nl.add),
    ),
    (
        "partition_mismatch",
        "partitions",
        "gen3",
        lambda: nisa.tensor_tensor(dst=sb(4, 4), data1=sb(4, 4), data2=sb(8, 4), op=nl.add),
    ),
    (
        "gpsimd_psum",
        "GpSimd cannot access PSUM",
        "gen3",
        lambda: nisa.tensor_tensor(dst=ps(4, 4), data1=sb(4, 4), data2=sb(4, 4), op=nl.add, engine=nisa.engine.gpsimd),
    ),
    (
        "power_psum",
        "GpSimd cannot access PSUM",
        "gen3",
        lambda: nisa.tensor_tensor(dst=sb(4, 4), data1=ps(4, 4), data2=sb(4, 4), op=nl.power),
    ),
    (
        "bits_of_floats",
        "integer tiles",
        "gen3",
        lambda: nisa.tensor_tensor(dst=sb(4, 4), data1=sb(4, 4), data2=sb(4, 4), op=nl.bitwise_and),
    ),
    ("no_divide", "nl operation", "gen3", lambda: vec(sb(4, 4), sb(4, 4), op0=nl.divide)),
    ("no_power_scalar", "nl.power", "gen3", lambda: vec(sb(4, 4), sb(4, 4), op0=nl.power, operand0=-0.5)),
    (
        "mixed_ops",
        "mix a bit operation",
        "gen3",
        lambda: vec(
            sb(4, 4, dtype=nl.int32),
            sb(4, 4, dtype=nl.int32),
            op0=nl.bitwise_and,
            operand0=1,
            op1=nl.add,
            operand1=1.0,
        ),
    ),
    ("vector_operand_dtype", "float32", "gen3", lambda: vec(sb(4, 4), sb(4, 4), operand0=sb(4, 1, dtype=BF16))),
    ("vector_operand_shape", r"\[P, 1\]", "gen3", lambda: vec(sb(4, 4), sb(4, 4), operand0=sb(4, 2))),
    ("vector_operand_partitions", "partitions", "gen3", lambda: vec(sb(4, 4), sb(4, 4), operand0=sb(8, 1))),
    ("operand1_alone", "without op1", "gen3", lambda: vec(sb(4, 4), sb(4, 4), operand1=1.0)),
    (
        "scalar_engine_pair",
        "Scalar engine runs",
        "gen3",
        lambda: vec(sb(4, 4), sb(4, 4), op0=nl.subtract, engine=nisa.engine.scalar),
    ),
    ("gpsimd_pair", "nl.rsqrt only", "gen3", lambda: vec(sb(4, 4), sb(4, 4), engine=nisa.engine.gpsimd)),
    ("rsqrt_psum", "PSUM", "gen3", lambda: vec(sb(4, 4), ps(4, 4), op0=nl.rsqrt, operand0=0.0)),
    ("square_gen3", "gen4", "gen3", lambda: vec(sb(4, 4), sb(4, 4), op0=nl.square, operand0=None)),
    ("abs_max_gen3", "gen4", "gen3", lambda: vec(sb(4, 4), sb(4, 4), op0=nl.abs_max)),
    ("unary_operand", "None or 0", "gen3", lambda: vec(sb(4, 4), sb(4, 4), op0=nl.abs, operand0=2.0)),
    ("start_partition_odd", "0, 32, 64 or 96", "gen3", lambda: vec(sb(64, 4)[16:32], sb(16, 4))),
    ("start_partition_33", "0 or 64", "gen3", lambda: vec(sb(128, 4)[32:65], sb(33, 4))),
    ("start_partition_65", "start at 0", "gen3", lambda: vec(sb(128, 4)[32:97], sb(65, 4))),
    (
        "reduce_partition_axis",
        "partition dim",
        "gen3",
        lambda: nisa.tensor_reduce(dst=sb(1, 1), op=nl.add, data=sb(4, 4), axis=(0, 1)),
    ),
    (
        "reduce_leading_axis",
        "last contiguous",
        "gen3",
        lambda: nisa.tensor_reduce(dst=sb(4, 2), op=nl.add, data=sb(4, 3, 2), axis=1),
    ),
    (
        "reduce_illegal_op",
        "legal reduction",
        "gen3",
        lambda: nisa.tensor_reduce(dst=sb(4, 1), op=nl.less, data=sb(4, 3), axis=1),
    ),
    (
        "reduce_dst_shape",
        r"is \[4, 3\]",
        "gen3",
        lambda: nisa.tensor_reduce(dst=sb(4, 2), op=nl.add, data=sb(4, 3, 2), axis=2),
    ),
    ("bn_stats_513", "512 elements", "gen3", lambda: nisa.bn_stats(dst=sb(4, 6), data=sb(4, 513))),
    ("bn_aggr_multiple", "multiple of 3", "gen3", lambda: nisa.bn_aggr(dst=sb(4, 2), data=sb(4, 4))),
    ("max8_7", "8 to 16384", "gen3", lambda: nisa.max8(dst=sb(4, 8), src=sb(4, 7))),
    ("max8_16385", "8 to 16384", "gen3", lambda: nisa.max8(dst=sb(4, 8), src=sb(4, 16385))),
    (
        "find_index_dtype",
        "uint16 or uint32",
        "gen3",
        lambda: nisa.nc_find_index8(dst=sb(4, 8), data=sb(4, 8), vals=sb(4, 8)),
    ),
    (
        "memset_float_into_int",
        "integer is wanted",
        "gen3",
        lambda: nisa.memset(dst=sb(4, 4, dtype=nl.int32), value=1.5),
    ),
    ("memset_range", "does not fit", "gen3", lambda: nisa.memset(dst=sb(4, 4, dtype=nl.uint8), value=256)),
    ("memset_hbm", "must be on chip", "gen3", lambda: nisa.memset(dst=hbm(4, 4), value=0.0)),
    ("memset_packed", "only 0", "gen4", lambda: nisa.memset(dst=sb(4, 4, dtype=MX), value=1)),
    (
        "copy_gpsimd_psum",
        "PSUM",
        "gen3",
        lambda: nisa.tensor_copy(dst=sb(4, 4), src=ps(4, 4), engine=nisa.engine.gpsimd),
    ),
    (
        "copy_scalar_gen2",
        "gen2",
        "gen2",
        lambda: nisa.tensor_copy(dst=sb(4, 4), src=sb(4, 4), engine=nisa.engine.scalar),
    ),
    (
        "predicate_dtype",
        "uint8",
        "gen3",
        lambda: nisa.tensor_copy_predicated(dst=sb(4, 4), src=sb(4, 4), predicate=sb(4, 4)),
    ),
    (
        "predicated_dtype",
        "dst's dtype",
        "gen3",
        lambda: nisa.tensor_copy_predicated(dst=sb(4, 4), src=sb(4, 4, dtype=BF16), predicate=sb(4, 4, dtype=nl.uint8)),
    ),
    (
        "activation_reduce_op",
        "legal reduction",
        "gen3",
        lambda: nisa.activation(
            dst=sb(4, 4),
            op=nl.exp,
            data=sb(4, 4),
            reduce_op=nl.maximum,
            reduce_res=sb(4, 1),
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        ),
    ),
    (
        "activation_alu_op",
        "activation functions",
        "gen3",
        lambda: nisa.activation(dst=sb(4, 4), op=nl.add, data=sb(4, 4)),
    ),
    (
        "activation_scale_dtype",
        "float32",
        "gen3",
        lambda: nisa.activation(dst=sb(4, 4), op=nl.exp, data=sb(4, 4), scale=sb(4, 1, dtype=BF16)),
    ),
    (
        "activation_bias_number_gen2",
        "gen2",
        "gen2",
        lambda: nisa.activation(dst=sb(4, 4), op=nl.exp, data=sb(4, 4), bias=1.0),
    ),
    (
        "activate2_pair",
        "legal pair",
        "gen4",
        lambda: nisa.activate2(dst=sb(4, 4), op=nl.exp, data=sb(4, 4), imm0=1.0, imm1=1.0, op0=nl.add, op1=nl.multiply),
    ),
    ("iota_psum", "must be in SBUF", "gen3", lambda: nisa.iota(dst=ps(4, 4), pattern=[[1, 4]])),
    ("iota_count", "multiply to 3", "gen3", lambda: nisa.iota(dst=sb(4, 4), pattern=[[1, 3]])),
    ("iota_rank", "1 to 4", "gen3", lambda: nisa.iota(dst=sb(4, 1), pattern=[[1, 1]] * 5)),
    (
        "affine_psum",
        "must be in SBUF",
        "gen3",
        lambda: nisa.affine_select(
            dst=sb(4, 4), pattern=[[1, 4]], channel_multiplier=1, on_true_tile=ps(4, 4), on_false_value=0.0
        ),
    ),
    ("range_gen2", "gen3", "gen2", rs),
    ("range_fill", "on_false_value", "gen3", lambda: rs(on_false_value=-1.0)),
    ("range_op", "legal reduction", "gen3", lambda: rs(reduce_op=nl.add)),
    ("range_bound", "float32", "gen3", lambda: rs(bound0=sb(4, 1, dtype=nl.int32))),
    ("range_2_24", "2\\^24", "gen3", lambda: rs(range_start=2**24 - 7)),
    (
        "select_predicate",
        "int8",
        "gen3",
        lambda: nisa.select_reduce(dst=sb(4, 4), predicate=sb(4, 4), on_true=sb(4, 4), on_false=0.0),
    ),
    ("dma_psum", "DMA does not reach PSUM", "gen3", lambda: nisa.dma_copy(dst=hbm(4, 4), src=ps(4, 4))),
    ("dma_count", "16 elements", "gen3", lambda: nisa.dma_copy(dst=sb(4, 4), src=hbm(4, 5))),
    (
        "dma_hwdge_cast",
        "does not cast",
        "gen3",
        lambda: nisa.dma_copy(dst=sb(4, 4, dtype=BF16), src=hbm(4, 4), dge_mode=nisa.dge_mode.hwdge),
    ),
    (
        "dma_hwdge_gen2",
        "gen3",
        "gen2",
        lambda: nisa.dma_copy(dst=sb(4, 4), src=hbm(4, 4), dge_mode=nisa.dge_mode.hwdge),
    ),
    (
        "dma_engine",
        "hwdge only",
        "gen3",
        lambda: nisa.dma_copy(dst=sb(4, 4), src=hbm(4, 4), engine=nisa.engine.sync),
    ),
    ("dma_priority", "gen4", "gen3", lambda: nisa.dma_copy(dst=sb(4, 4), src=hbm(4, 4), priority=1)),
    ("dma_transpose_shape", "match exactly", "gen3", lambda: nisa.dma_transpose(dst=sb(4, 8), src=hbm(4, 8))),
    (
        "dma_transpose_hwdge_rows",
        "16 rows",
        "gen3",
        lambda: nisa.dma_transpose(dst=sb(8, 32, dtype=BF16), src=hbm(32, 8, dtype=BF16), dge_mode=nisa.dge_mode.hwdge),
    ),
    ("dma_transpose_dtype", "src's dtype", "gen3", lambda: nisa.dma_transpose(dst=sb(8, 4, dtype=BF16), src=hbm(4, 8))),
    (
        "dma_compute_scale",
        "1.0",
        "gen3",
        lambda: nisa.dma_compute(dst=sb(4, 4), srcs=[hbm(4, 4)], reduce_op=nl.add, scales=[2.0]),
    ),
    (
        "dma_compute_17",
        "1 to 16",
        "gen3",
        lambda: nisa.dma_compute(dst=sb(4, 4), srcs=[hbm(4, 4)] * 17, reduce_op=nl.add),
    ),
    ("barrier_one_core", "two cores", "gen3", lambda: nisa.core_barrier(data=hbm(4, 4), cores=(0, 1))),
    (
        "vector_offset_sbuf_only",
        r"\(P, 1\) tile in SBUF",
        "gen3",
        lambda: hbm(8, 4).vector_select(0, sb(4, 2, dtype=nl.int32)),
    ),
    (
        "vector_offset_hwdge",
        "needs swdge",
        "gen3",
        lambda: nisa.dma_copy(
            dst=sb(4, 4), src=hbm(8, 4).vector_select(0, sb(4, 1, dtype=nl.int32)), dge_mode=nisa.dge_mode.hwdge
        ),
    ),
    ("store_psum", "PSUM", "gen3", lambda: nl.store(hbm(4, 4), ps(4, 4))),
    (
        "scan_both_psum",
        "both in PSUM",
        "gen3",
        lambda: nisa.tensor_tensor_scan(
            dst=sb(4, 4), data0=ps(4, 4), data1=ps(4, 4), initial=0.0, op0=nl.add, op1=nl.add
        ),
    ),
    (
        "cumulative_int32",
        "not supported",
        "gen3",
        lambda: nisa.tensor_scalar_cumulative(
            dst=sb(4, 4, dtype=nl.int32), src=sb(4, 4, dtype=nl.int32), op0=nl.add, op1=nl.add, imm0=0.0
        ),
    ),
    (
        "shuffle_mask",
        "32 entries",
        "gen3",
        lambda: nisa.nc_stream_shuffle(dst=sb(32, 4), src=sb(32, 4), shuffle_mask=[0] * 31),
    ),
    (
        "gather_dtype",
        "uint32",
        "gen3",
        lambda: nisa.nc_n_gather(dst=sb(4, 4), data=sb(4, 4), indices=sb(4, 4, dtype=nl.int32)),
    ),
    (
        "local_gather_16",
        "multiple of 16",
        "gen3",
        lambda: nisa.local_gather(dst=sb(8, 64), src_buffer=sb(8, 4), index=sb(8, 4, dtype=nl.uint16)),
    ),
    (
        "topk_n",
        "8 <= n",
        "gen3",
        lambda: nisa.topk(
            val_dst=sb(16, 4, dtype=BF16), idx_dst=sb(16, 4, dtype=nl.uint32), src=sb(16, 4, dtype=BF16), n=7
        ),
    ),
    (
        "partition_reduce_op",
        "allowed",
        "gen3",
        lambda: nisa.tensor_partition_reduce(dst=sb(1, 4), op=nl.minimum, data=sb(4, 4)),
    ),
    ("broadcast_dst", "broadcast view", "gen3", lambda: nisa.tensor_copy(dst=sb(4, 1).broadcast(1, 4), src=sb(4, 4))),
    ("fori_step", "positive", "gen3", lambda: nl.fori_loop(0, 4, lambda i: None, step=0)),
]


# (name, words of the message, target, refused call): the documented limits that the list above leaves
OTHER_LIMITS = [
    (
        "ap_exclusive",
        "exclusive",
        "gen3",
        lambda: hbm(8, 4).ap([[4, 4], [1, 4]], scalar_offset=one(), vector_offset=sb(4, 1, dtype=I32)),
    ),
    (
        "ap_vector_on_chip",
        "HBM tensors only",
        "gen3",
        lambda: sb(8, 4).ap([[4, 4], [1, 4]], vector_offset=sb(4, 1, dtype=I32)),
    ),
    ("ap_vector_float", "int32 or uint32", "gen3", lambda: hbm(8, 4).ap([[4, 4], [1, 4]], vector_offset=sb(4, 1))),
    (
        "ap_vector_in_hbm",
        "tile in SBUF",
        "gen3",
        lambda: hbm(8, 4).ap([[4, 4], [1, 4]], vector_offset=hbm(4, 1, dtype=I32)),
    ),
    (
        "ap_vector_short",
        "3 indices for 4 rows",
        "gen3",
        lambda: hbm(8, 4).ap([[4, 4], [1, 4]], vector_offset=sb(3, 1, dtype=I32)),
    ),
    (
        "ap_scalar_in_hbm",
        "1 x 1 tile in SBUF",
        "gen3",
        lambda: hbm(8, 4).ap([[4, 4], [1, 4]], scalar_offset=hbm(1, 1, dtype=I32)),
    ),
    ("ap_scalar_float", "integer", "gen3", lambda: hbm(8, 4).ap([[4, 4], [1, 4]], scalar_offset=sb(1, 1))),
    ("ap_scalar_many", "1 x 1", "gen3", lambda: hbm(8, 4).select(0, sb(1, 2, dtype=I32))),
    ("ap_rank", "at most 5", "gen3", lambda: sb(4, 8).ap([[8, 4]] + [[1, 1]] * 5)),
    ("ap_partition_stride", "cannot be strided", "gen3", lambda: sb(8, 8).ap([[16, 4], [1, 8]])),
    ("ap_into_next_partition", "leaves the storage", "gen3", lambda: vec(sb(4, 9), sb(8, 8).ap([[8, 4], [1, 9]]))),
    (
        "ap_offset_into_next",
        "leaves the storage",
        "gen3",
        lambda: vec(sb(4, 8), sb(8, 8).ap([[8, 4], [1, 8]], offset=1)),
    ),
    ("slice_past_the_end", "not clamped", "gen3", lambda: sb(8, 8)[:, 0:9]),
    ("index_past_the_end", "index 8", "gen3", lambda: sb(8, 8)[:, 8]),
    ("slice_partition_step", "cannot be strided", "gen3", lambda: sb(8, 8)[::2]),
    ("dynamic_partition", "partition dim", "gen3", lambda: sb(8, 8)[nl.ds(nisa.register_alloc(1), 2)]),
    ("broadcast_partition", "partition dim", "gen3", lambda: sb(1, 8).broadcast(0, 4)),
    ("permute_partition", "must be 0", "gen3", lambda: sb(8, 8).permute((1, 0))),
    ("reshape_count", "64 elements", "gen3", lambda: sb(8, 8).reshape((8, 65))),
    ("reshape_partition", "stays 8", "gen3", lambda: sb(8, 8).reshape((4, 16))),
    ("view_remainder", "no whole number", "gen3", lambda: sb(4, 3, dtype=BF16).view(nl.float32)),
    ("indirect_gen3", "gen4", "gen3", lambda: sb(32, 8).indirect(sb(32, 1, dtype=nl.uint16), 8)),
    ("indirect_start", "multiple of 32", "gen4", lambda: sb(32, 8).indirect(sb(64, 1, dtype=nl.uint16)[16:48], 8)),
    (
        "indirect_data2",
        "cannot be an .indirect",
        "gen4",
        lambda: nisa.tensor_tensor(
            dst=sb(32, 8), data1=sb(32, 8), data2=sb(32, 8).indirect(sb(32, 1, dtype=nl.uint16), 8), op=nl.add
        ),
    ),
    (
        "indirect_matmul_tile",
        r"needs \(0, 0\)",
        "gen4",
        lambda: mm(
            ps(8, 8),
            sb(32, 8),
            sb(32, 8).indirect(sb(32, 1, dtype=nl.uint16), 8),
            tile_size=(32, 128),
            tile_position=(32, 0),
        ),
    ),
    ("loop_tile_escapes", "not visible here", "gen3", lambda: escape()),
    ("read_only_loop_variable", "read-only", "gen3", lambda: nl.fori_loop(0, 1, lambda i: nisa.register_move(i, 3))),
    ("while_result", "condition register", "gen3", lambda: nl.while_loop(nisa.register_alloc(1), lambda: None)),
    (
        "matmul_position_128",
        "below 128",
        "gen3",
        lambda: mm(ps(4, 4), sb(4, 4), sb(4, 4), tile_size=(64, 64), tile_position=(128, 0)),
    ),
    (
        "matmul_tile_96",
        "size is",
        "gen3",
        lambda: mm(ps(4, 4), sb(4, 4), sb(4, 4), tile_size=(96, 128), tile_position=(0, 0)),
    ),
    ("matmul_k", "partition dim", "gen3", lambda: mm(ps(4, 4), sb(129, 4), sb(129, 4))),
    (
        "double_row_gen2",
        "gen3",
        "gen2",
        lambda: mm(ps(4, 4), sb(4, 2, 4, dtype=FP8), sb(4, 2, 4, dtype=FP8), perf_mode=DOUBLE),
    ),
    (
        "matmul_e8m0",
        "dtype float8_e8m0fnu",
        "gen4",
        lambda: mm(ps(4, 4), sb(4, 4, dtype=nl.float8_e8m0fnu), sb(4, 4, dtype=nl.float8_e8m0fnu)),
    ),
    ("mx_moving", "exceeds 4096", "gen4", lambda: mx_wide(4097, nl.float32)),
    ("mx_moving_bf16", "exceeds 8192", "gen4", lambda: mx_wide(8193, BF16)),
    ("mx_dst", "float32 or bfloat16", "gen4", lambda: mx_wide(32, nl.float16)),
    (
        "mx_columns",
        "row tiling only",
        "gen4",
        lambda: mx_wide(32, nl.float32, tile_size=(128, 64), tile_position=(0, 0)),
    ),
    (
        "mx_plain_operand",
        "packed x4",
        "gen4",
        lambda: nisa.nc_matmul_mx(
            dst=ps(32, 32),
            stationary=sb(32, 32),
            moving=sb(32, 32),
            stationary_scale=sb(32, 32, dtype=nl.uint8),
            moving_scale=sb(32, 32, dtype=nl.uint8),
        ),
    ),
    ("quantize_gen3", "gen4", "gen3", lambda: quantize(32, 4)),
    ("quantize_partitions", "multiple of 32", "gen4", lambda: quantize(48, 4)),
    ("quantize_free", "multiple of 4", "gen4", lambda: quantize(32, 6)),
    ("quantize_mxfp4", "no MXFP4 output", "gen4", lambda: quantize(32, 4, nl.float4_e2m1fn_x4)),
    (
        "transpose_pe_from_psum",
        "must be in SBUF|reads SBUF",
        "gen3",
        lambda: nisa.nc_transpose(dst=ps(4, 4), data=ps(4, 4), engine=nisa.engine.tensor),
    ),
    (
        "transpose_pe_to_sbuf",
        "writes PSUM",
        "gen3",
        lambda: nisa.nc_transpose(dst=sb(4, 4), data=sb(4, 4), engine=nisa.engine.tensor),
    ),
    ("dma_priority_4", r"0 \(highest\) to 3", "gen4", lambda: nisa.dma_copy(dst=sb(4, 4), src=hbm(4, 4), priority=4)),
    (
        "dma_engine_gpsimd",
        "sync or scalar",
        "gen3",
        lambda: nisa.dma_copy(dst=sb(4, 4), src=hbm(4, 4), dge_mode=HWDGE, engine=nisa.engine.gpsimd),
    ),
    (
        "dma_index_columns",
        r"\(P, 1\)",
        "gen3",
        lambda: nisa.dma_copy(dst=sb(4, 4), src=hbm(8, 4).ap([[4, 4], [1, 4]], vector_offset=sb(4, 2, dtype=I32))),
    ),
    (
        "dma_out_of_bounds",
        "out of bounds",
        "gen3",
        lambda: nisa.dma_copy(dst=sb(4, 4), src=hbm(8, 4).ap([[4, 4], [1, 4]], vector_offset=filled(4, 8))),
    ),
    ("turn_axes", r"\(1, 0\)", "gen3", lambda: nisa.dma_transpose(dst=sb(8, 4), src=hbm(4, 8), axes=(0, 1))),
    (
        "turn_axes_3d",
        r"\(2, 1, 0\)",
        "gen3",
        lambda: nisa.dma_transpose(dst=sb(8, 4, 2), src=hbm(2, 4, 8), axes=(2, 0, 1)),
    ),
    ("turn_into_hbm", "must be in SBUF", "gen3", lambda: nisa.dma_transpose(dst=hbm(8, 4), src=hbm(4, 8))),
    ("turn_psum", "DMA does not reach PSUM", "gen3", lambda: nisa.dma_transpose(dst=sb(8, 4), src=ps(4, 8))),
    (
        "turn_swdge",
        "unknown or hwdge",
        "gen3",
        lambda: nisa.dma_transpose(dst=sb(8, 4), src=hbm(4, 8), dge_mode=nisa.dge_mode.swdge),
    ),
    (
        "turn_skip",
        "indirect src",
        "gen3",
        lambda: nisa.dma_transpose(dst=sb(8, 4), src=hbm(4, 8), oob_mode=nisa.oob_mode.skip),
    ),
    (
        "turn_hwdge_4_byte",
        "2-byte",
        "gen3",
        lambda: nisa.dma_transpose(dst=sb(32, 16), src=hbm(16, 32), dge_mode=HWDGE),
    ),
    ("turn_hwdge_3d_rows", "1, 2, 4, 8 or 16", "gen3", lambda: turn_hwdge(3, 16, 8)),
    ("turn_hwdge_3d_product", "multiple of 16", "gen3", lambda: turn_hwdge(2, 4, 8)),
    ("turn_gather_gen2", "gen3", "gen2", lambda: turn_gather(16, 8)),
    ("turn_gather_rows", "multiple of 16", "gen3", lambda: turn_gather(8, 8)),
    ("turn_gather_int32", "uint32", "gen3", lambda: turn_gather(16, 8, dtype=I32)),
    ("turn_gather_columns", "all 128", "gen3", lambda: turn_gather(32, 8, index=(16, 2))),
    ("turn_gather_hwdge", "needs swdge", "gen3", lambda: turn_gather(16, 8, dge_mode=HWDGE)),
    (
        "predicated_both_psum",
        "both in PSUM",
        "gen3",
        lambda: nisa.tensor_copy_predicated(dst=sb(4, 4), src=ps(4, 4), predicate=ps(4, 4, dtype=nl.uint32)),
    ),
    ("cumulative_op1", "legal reduction", "gen3", lambda: cumulative(op1=nl.logical_and)),
    ("cumulative_idle", "reset_reduce, reduce, load_reduce", "gen3", lambda: cumulative(reduce_cmd=CMD.idle)),
    ("cumulative_imm1", "load_reduce only", "gen3", lambda: cumulative(imm1=1.0)),
    (
        "activation_elements",
        "elements per partition",
        "gen3",
        lambda: nisa.activation(dst=sb(4, 4), op=nl.exp, data=sb(4, 5)),
    ),
    (
        "activation_reciprocal_bias",
        "no bias on gen2",
        "gen2",
        lambda: nisa.activation(dst=sb(4, 4), op=nl.reciprocal, data=sb(4, 4), bias=sb(4, 1)),
    ),
    (
        "activation_load_reduce",
        "load_reduce is not allowed",
        "gen3",
        lambda: nisa.activation(dst=sb(4, 4), op=nl.exp, data=sb(4, 4), reduce_op=nl.add, reduce_cmd=CMD.load_reduce),
    ),
    (
        "activation_bias_tfloat32",
        "tfloat32 is not taken",
        "gen3",
        lambda: nisa.activation(dst=sb(4, 4), op=nl.exp, data=sb(4, 4), bias=sb(4, 1, dtype=nl.tfloat32)),
    ),
    (
        "activation_reduce_max",
        "legal reduction",
        "gen3",
        lambda: nisa.activation_reduce(
            dst=sb(4, 4), op=nl.exp, data=sb(4, 4), reduce_op=nl.maximum, reduce_res=sb(4, 1)
        ),
    ),
    (
        "activation_reduce_res_shape",
        r"is \[4, 1\]",
        "gen3",
        lambda: nisa.activation_reduce(dst=sb(4, 4), op=nl.exp, data=sb(4, 4), reduce_op=nl.add, reduce_res=sb(4, 2)),
    ),
    (
        "activation_gpsimd_gen3",
        "cannot run it",
        "gen3",
        lambda: nisa.activation(dst=sb(4, 4), op=nl.exp, data=sb(4, 4), engine=nisa.engine.gpsimd),
    ),
    ("activate2_gen3", "gen4", "gen3", lambda: activate2()),
    (
        "activate2_reduction",
        "legal reduction",
        "gen4",
        lambda: activate2(reduce_op=nl.multiply, reduce_res=sb(4, 1), reduce_cmd=CMD.reset_reduce),
    ),
    (
        "activate2_imm_dtypes",
        "two tiles share one",
        "gen4",
        lambda: activate2(imm0=sb(4, 1), imm1=sb(4, 1, dtype=BF16)),
    ),
    (
        "gather_range",
        r"outside \[0, 4\)",
        "gen3",
        lambda: nisa.nc_n_gather(dst=sb(4, 4), data=sb(4, 4), indices=filled(4, 4, nl.uint32, 4)),
    ),
    ("local_gather_block", "1, 2, 4, 8, 16 or 32", "gen3", lambda: local(num_elem_per_idx=3)),
    ("local_gather_dtype", "uint16", "gen3", lambda: local(index=sb(16, 2, dtype=nl.uint32))),
    ("local_gather_4097", "at most 4096", "gen3", lambda: local(dst=sb(16, 4112), index=sb(16, 257, dtype=nl.uint16))),
    (
        "scan_op",
        "two-operand arithmetic",
        "gen3",
        lambda: nisa.tensor_tensor_scan(
            dst=sb(4, 4), data0=sb(4, 4), data1=sb(4, 4), initial=0.0, op0=nl.bitwise_and, op1=nl.add
        ),
    ),
    (
        "shuffle_entry",
        r"\[0, 32\) or 255",
        "gen3",
        lambda: nisa.nc_stream_shuffle(dst=sb(32, 4), src=sb(32, 4), shuffle_mask=[32] * 32),
    ),
    (
        "shuffle_dtype",
        "src's dtype",
        "gen3",
        lambda: nisa.nc_stream_shuffle(dst=sb(32, 4, dtype=BF16), src=sb(32, 4), shuffle_mask=[0] * 32),
    ),
    ("rng_float", "integer tile", "gen3", lambda: nisa.rng(dst=sb(4, 4))),
    ("rng_gpsimd_psum", "PSUM", "gen3", lambda: nisa.rng(dst=ps(4, 4, dtype=I32), engine=nisa.engine.gpsimd)),
    ("rng_gpsimd_gen2", "gen3", "gen2", lambda: nisa.rng(dst=sb(4, 4, dtype=I32), engine=nisa.engine.gpsimd)),
    ("seed_shape", r"\[1, 1\]", "gen3", lambda: nisa.set_rng_seed(sb(1, 2, dtype=I32))),
    ("state_width", r"\[P, 6\]", "gen3", lambda: nisa.rand_set_state(sb(4, 5, dtype=nl.uint32))),
    (
        "state_vector_gen3",
        "gen4",
        "gen3",
        lambda: nisa.rand_get_state(sb(4, 24, dtype=nl.uint32), engine=nisa.engine.vector),
    ),
    ("rand2_gen3", "gen4", "gen3", lambda: nisa.rand2(dst=sb(4, 4), min=0.0, max=1.0)),
    ("rand2_range", "min < max", "gen4", lambda: nisa.rand2(dst=sb(4, 4), min=1.0, max=1.0)),
    ("dropout_dtype", "data's dtype", "gen3", lambda: nisa.dropout(dst=sb(4, 4, dtype=BF16), data=sb(4, 4), prob=0.5)),
    ("exponential_gen3", "gen4", "gen3", lambda: nisa.exponential(dst=sb(4, 4), src=sb(4, 4))),
    ("exponential_rank", "at most 4 dims", "gen4", lambda: nisa.exponential(dst=sb(4, 16), src=sb(4, 2, 2, 2, 2))),
    (
        "exponential_init",
        "must be 0 unless",
        "gen4",
        lambda: nisa.exponential(dst=sb(4, 4), src=sb(4, 4), reduce_init=1.0),
    ),
    (
        "exponential_dst",
        "uint32 is not taken",
        "gen4",
        lambda: nisa.exponential(dst=sb(4, 4, dtype=nl.uint32), src=sb(4, 4)),
    ),
    ("max8_rank", "at most 3 dims", "gen3", lambda: nisa.max8(dst=sb(4, 8), src=sb(4, 2, 2, 4))),
    (
        "bounds_partitions",
        "partition dim is 1",
        "gen3",
        lambda: nisa.sequence_bounds(dst=sb(2, 2, 4), segment_ids=sb(2, 4)),
    ),
    (
        "bounds_dtype",
        "float32 or int32",
        "gen3",
        lambda: nisa.sequence_bounds(dst=sb(1, 2, 4), segment_ids=sb(1, 4, dtype=BF16)),
    ),
    (
        "stt_bits",
        "two-operand arithmetic",
        "gen3",
        lambda: nisa.scalar_tensor_tensor(
            dst=sb(4, 4), data=sb(4, 4), op0=nl.bitwise_and, operand0=1, op1=nl.add, operand1=sb(4, 4)
        ),
    ),
    (
        "stt_both_psum",
        "both in PSUM",
        "gen3",
        lambda: nisa.scalar_tensor_tensor(
            dst=sb(4, 4), data=ps(4, 4), op0=nl.add, operand0=1.0, op1=nl.add, operand1=ps(4, 4)
        ),
    ),
    ("tsr_reverse", "not supported yet", "gen3", lambda: scalar_reduce(reverse0=True)),
    ("tsr_op", "arithmetic only", "gen3", lambda: scalar_reduce(op0=nl.bitwise_or)),
    ("tsr_reduction", "legal reduction", "gen3", lambda: scalar_reduce(reduce_op=nl.subtract)),
    ("tsr_idle", "idle is not allowed", "gen3", lambda: scalar_reduce(reduce_cmd=CMD.idle)),
    ("barrier_cores", r"must be \(0, 1\)", "gen3x2", lambda: nisa.core_barrier(data=hbm(4, 4), cores=(0,))),
    ("barrier_private", "shared_hbm", "gen3x2", lambda: nisa.core_barrier(data=sb(4, 4), cores=(0, 1))),
    ("sendrecv_rank", "0 or 1", "gen3x2", lambda: exchange(send_to_rank=2)),
    ("sendrecv_dtype", "src's dtype", "gen3x2", lambda: exchange(dst=sb(4, 4, dtype=BF16))),
    ("sendrecv_psum", "must be in SBUF", "gen3x2", lambda: exchange(src=ps(4, 4))),
    (
        "sendrecv_gpsimd_bytes",
        "1024 bytes",
        "gen3x2",
        lambda: exchange(src=sb(4, 257), dst=sb(4, 257), dma_engine=nisa.dma_engine.gpsimd_dma),
    ),
    (
        "dma_compute_op",
        "nl.add only",
        "gen3",
        lambda: nisa.dma_compute(dst=sb(4, 4), srcs=[hbm(4, 4)], reduce_op=nl.maximum),
    ),
    ("dma_compute_unique", "must be True", "gen3", lambda: scatter_add(unique_indices=False)),
    ("dma_compute_two", "exactly 2", "gen3", lambda: scatter_add(extra=True)),
    ("dma_compute_alias", "aliases dst", "gen3", lambda: scatter_add(alias=False)),
    (
        "dma_compute_count",
        "has 20 elements",
        "gen3",
        lambda: nisa.dma_compute(dst=sb(4, 4), srcs=[hbm(4, 5)], reduce_op=nl.add),
    ),
    ("range_comparison", "range comparisons", "gen3", lambda: rs(comp_op0=nl.not_equal)),
    ("range_int", "float tile", "gen3", lambda: rs(on_true_tile=sb(4, 8, dtype=I32))),
    ("range_number_bound", r"\[P, 1\] tile is wanted", "gen3", lambda: rs(bound1=3.0)),
    ("select_int32", "int32 is not taken", "gen3", lambda: pick(on_true=sb(4, 4, dtype=I32))),
    ("select_add", "legal reduction", "gen3", lambda: pick(reduce_op=nl.add)),
    ("select_both_psum", "both in PSUM", "gen3", lambda: pick(on_true=ps(4, 4), predicate=ps(4, 4, dtype=nl.uint16))),
    ("register_64_bit", "one element", "gen3", lambda: nisa.register_load(nisa.register_alloc(), sb(1, 2, dtype=I32))),
    (
        "register_packed",
        "at most 32 bits",
        "gen4",
        lambda: nisa.register_load(nisa.register_alloc(), sb(1, 1, dtype=MX)),
    ),
    ("register_psum", "it is in PSUM", "gen3", lambda: nisa.register_load(nisa.register_alloc(), ps(1, 1, dtype=I32))),
    ("register_float", "None or an int", "gen3", lambda: nisa.register_alloc(1.5)),
    (
        "replace_vals",
        r"is \[4, 8\]",
        "gen3",
        lambda: nisa.nc_match_replace8(dst=sb(4, 8), data=sb(4, 8), vals=sb(4, 7), imm=0.0),
    ),
    ("nonzero_gen2", "gen3", "gen2", lambda: nisa.nonzero_with_count(dst=sb(4, 5, dtype=I32), src=sb(4, 4))),
    ("nonzero_dst", r"is \[4, 5\]", "gen3", lambda: nisa.nonzero_with_count(dst=sb(4, 4, dtype=I32), src=sb(4, 4))),
    ("topk_partitions", "multiple of 16", "gen3", lambda: top(8)),
    ("topk_k", "K <= n", "gen3", lambda: top(16, k=17, n=16)),
    ("topk_source", "per partition", "gen3", lambda: top(16, n=65)),
    (
        "topk_dtype",
        "bfloat16 is wanted",
        "gen3",
        lambda: nisa.topk(val_dst=sb(16, 4), idx_dst=sb(16, 4, dtype=nl.uint32), src=sb(16, 4, dtype=BF16), n=16),
    ),
    (
        "partition_reduce_psum",
        "must be in SBUF",
        "gen3",
        lambda: nisa.tensor_partition_reduce(dst=sb(1, 4), op=nl.add, data=ps(4, 4)),
    ),
    ("scalar_engine_gen2", "gen3", "gen2", lambda: vec(sb(4, 4), sb(4, 4), engine=nisa.engine.scalar)),
    (
        "bits_with_a_float",
        "take an integer",
        "gen3",
        lambda: vec(sb(4, 4, dtype=I32), sb(4, 4, dtype=I32), op0=nl.bitwise_and, operand0=1.0),
    ),
    (
        "reduce_negate_bits",
        "no negation",
        "gen3",
        lambda: nisa.tensor_reduce(
            dst=sb(4, 1, dtype=I32), op=nl.bitwise_or, data=sb(4, 4, dtype=I32), axis=1, negate=True
        ),
    ),
    ("reciprocal_partitions", "partitions", "gen3", lambda: nisa.reciprocal(dst=sb(4, 4), data=sb(8, 4))),
    ("nl_sum_axis_0", "trailing free dims", "gen3", lambda: nl.sum(sb(4, 4), axis=0)),
    ("nl_power_scalar", r"tile \*\* tile", "gen3", lambda: nl.power(sb(4, 4), 2.0)),
    ("nl_seed_int", r"\[1, 1\] tile", "gen3", lambda: nl.random_seed(3)),
    ("nl_program_axis", "one axis", "gen3", lambda: nl.program_id(1)),
]


def one():
    return sb(1, 1, dtype=I32)


def filled(partitions, value, dtype=nl.int32, width=1):
    tile = nl.ndarray((partitions, width), dtype, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=value)
    return tile


def escape():
    kept = []
    nl.fori_loop(0, 1, lambda i: kept.append(sb(4, 4)))
    vec(sb(4, 4), kept[0])


def mx_wide(n, dtype, **tiling):
    nisa.nc_matmul_mx(
        dst=ps(32, min(n, 4096 if dtype == nl.float32 else 8192), dtype=dtype),
        stationary=sb(32, 32, dtype=MX),
        moving=sb(32, n, dtype=MX),
        stationary_scale=sb(32, 32, dtype=nl.uint8),
        moving_scale=sb(32, n, dtype=nl.uint8),
        **tiling,
    )


def quantize(p, f, dtype=MX):
    nisa.quantize_mx(dst=sb(p, f // 4, dtype=dtype), src=sb(p, f, dtype=BF16), dst_scale=sb(64, f // 4, dtype=nl.uint8))


def turn_hwdge(*shape):
    nisa.dma_transpose(dst=sb(*reversed(shape), dtype=BF16), src=hbm(*shape, dtype=BF16), dge_mode=HWDGE)


def turn_gather(rows, width, dtype=nl.uint32, index=None, **kwargs):
    table = hbm(64, width, dtype=BF16)
    indices = sb(*(index or (rows, 1)), dtype=dtype)
    nisa.dma_transpose(
        dst=sb(width, rows, dtype=BF16),
        src=table.ap([[width, rows], [1, width]], vector_offset=indices),
        **kwargs,
    )


def cumulative(**kwargs):
    given = {"dst": sb(4, 4), "src": sb(4, 4), "op0": nl.add, "op1": nl.add, "imm0": 0.0}
    nisa.tensor_scalar_cumulative(**{**given, **kwargs})


def activate2(**kwargs):
    given = {
        "dst": sb(4, 4), "op": nl.exp, "data": sb(4, 4), "imm0": 1.0, "imm1": 1.0, "op0": nl.multiply, "op1": nl.add,
    }  # fmt: skip
    nisa.activate2(**{**given, **kwargs})


def local(**kwargs):
    given = {"dst": sb(16, 32), "src_buffer": sb(16, 6), "index": sb(16, 2, dtype=nl.uint16)}
    nisa.local_gather(**{**given, **kwargs})


def scalar_reduce(**kwargs):
    given = {"dst": sb(4, 4), "data": sb(4, 4), "op0": nl.add, "operand0": 0.0, "reduce_op": nl.add}
    nisa.tensor_scalar_reduce(**{**given, **kwargs})


def exchange(**kwargs):
    peer = 1 - nl.program_id(0)
    given = {"src": sb(4, 4), "dst": sb(4, 4), "send_to_rank": peer, "recv_from_rank": peer, "pipe_id": 0}
    nisa.sendrecv(**{**given, **kwargs})


def scatter_add(alias=True, extra=False, **kwargs):
    table = hbm(8, 4)
    there = table.ap([[4, 4], [1, 4]], vector_offset=filled(4, 1))
    srcs = [there if alias else hbm(4, 4), sb(4, 4)] + ([sb(4, 4)] if extra else [])
    nisa.dma_compute(dst=there, srcs=srcs, reduce_op=nl.add, **kwargs)


def pick(**kwargs):
    given = {"dst": sb(4, 4), "predicate": sb(4, 4, dtype=nl.uint8), "on_true": sb(4, 4), "on_false": 0.0}
    nisa.select_reduce(**{**given, **kwargs})


def top(partitions, k=4, n=16):
    nisa.topk(
        val_dst=sb(partitions, k, dtype=BF16),
        idx_dst=sb(partitions, k, dtype=nl.uint32),
        src=sb(partitions, 4, dtype=BF16),
        n=n,
    )


@pytest.mark.parametrize(("words", "target", "call"), [r[1:] for r in OTHER_LIMITS], ids=[r[0] for r in OTHER_LIMITS])
def test_other_limit_is_refused(words, target, call):
    with pytest.raises(NkiValidationError, match=words) as caught:
        attempt(call, target)
    assert "[awsdocs-neuron" in str(caught.value)


def test_every_instruction_with_a_documented_limit_has_a_refused_call():
    """api.json's limits against the instructions that the two lists make raise."""
    raised = set()
    for _, _, target, call in (*REFUSED, *OTHER_LIMITS):
        try:
            attempt(call, target)
        except NkiValidationError as error:
            raised.add(str(error).split(":")[0])
    entries = json.loads((pathlib.Path(nki_emulator.__file__).parent / "api.json").read_text())["functions"]
    limited = {e["name"].replace("nki.isa", "nisa") for e in entries if e["module"] == "nki.isa" and e["limits"]}
    assert limited <= raised | {"nisa.register_alloc"}, limited - raised


@pytest.mark.parametrize(("words", "target", "call"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_limit_is_refused(words, target, call):
    with pytest.raises(NkiValidationError, match=words):
        attempt(call, target)


@pytest.mark.parametrize("keyword", ["mask", "dtype"])
def test_old_keywords_are_gone(keyword):
    with pytest.raises(TypeError, match=keyword):
        attempt(lambda: nisa.tensor_copy(dst=sb(4, 4), src=sb(4, 4), **{keyword: None}), "gen3")


def test_message_names_instruction_operand_limit_and_page():
    with pytest.raises(NkiValidationError) as caught:
        attempt(lambda: mm(ps(4, 512), sb(4, 4), sb(4, 513)), "gen3")
    for part in ("nisa.nc_matmul", "`moving`", "513", "512", "nki.isa.nc_matmul.html"):
        assert part in str(caught.value)


def add_ranks():
    nisa.tensor_tensor(dst=sb(128, 32), data1=sb(128, 32), data2=sb(128, 4, 8), op=nl.add)


# What production kernels do, so what an emulator must take.
ACCEPTED = [
    ("edge_matmul", "gen3", lambda: mm(ps(128, 512), sb(128, 128), sb(128, 512))),
    ("edge_matmul_gen4", "gen4", lambda: mm(ps(128, 4096), sb(128, 128), sb(128, 4096))),
    (
        "edge_matmul_gen4_bf16",
        "gen4",
        lambda: mm(ps(128, 8192, dtype=BF16), sb(128, 128, dtype=BF16), sb(128, 8192, dtype=BF16)),
    ),
    (
        "matmul_mixed_low",
        "gen3",
        lambda: mm(ps(4, 4), sb(4, 4, dtype=BF16), sb(4, 4, dtype=nl.float16)),
    ),
    (
        "matmul_tiles",
        "gen3",
        lambda: mm(ps(32, 4), sb(32, 32), sb(32, 4), tile_size=(32, 32), tile_position=(96, 64)),
    ),
    ("memset_int_zero", "gen3", lambda: nisa.memset(dst=sb(4, 4), value=0)),
    ("dma_casts", "gen3", lambda: nisa.dma_copy(dst=sb(4, 4, dtype=BF16), src=hbm(4, 4))),
    (
        "dma_casts_back",
        "gen3",
        lambda: nisa.dma_copy(dst=hbm(4, 4), src=sb(4, 4, dtype=BF16), dge_mode=nisa.dge_mode.none),
    ),
    ("dma_shapes", "gen3", lambda: nisa.dma_copy(dst=sb(1, 16), src=hbm(16))),
    ("tensor_tensor_ranks", "gen3", add_ranks),
    ("reduce_rank_3", "gen3", lambda: nisa.tensor_reduce(dst=sb(4, 3), op=nl.add, data=sb(4, 3, 2), axis=(2,))),
    ("reduce_bf16", "gen3", lambda: nisa.tensor_reduce(dst=sb(4, 1, dtype=BF16), op=nl.add, data=sb(4, 3), axis=1)),
    ("bf16_bias", "gen3", lambda: nisa.activation(dst=sb(4, 4), op=nl.exp, data=sb(4, 4), bias=sb(4, 1, dtype=BF16))),
    ("bf16_transpose", "gen3", lambda: nisa.nc_transpose(dst=ps(4, 4, dtype=BF16), data=sb(4, 4, dtype=BF16))),
    ("start_96", "gen3", lambda: vec(sb(128, 4)[96:128], sb(32, 4))),
    ("start_64", "gen3", lambda: vec(sb(128, 4)[64:128], sb(64, 4))),
    ("range_default_fill", "gen3", lambda: rs(on_false_value=-3.4028235e38)),
    (
        "activation_engine_07",
        "gen3",
        lambda: nisa.activation(dst=sb(4, 4), op=nl.exp, data=sb(4, 4), engine=nisa.engine.scalar),
    ),
    ("dma_any_partition", "gen3", lambda: nisa.dma_copy(dst=sb(128, 4)[5:6, :], src=hbm(1, 4))),
]


@pytest.mark.parametrize(("target", "call"), [a[1:] for a in ACCEPTED], ids=[a[0] for a in ACCEPTED])
def test_real_code_is_taken(target, call):
    attempt(call, target)


def test_live_sbuf_overflow_is_refused():
    def body():
        tiles = [sb(128, 20 * 1024) for _ in range(3)]  # 3 x 80 KiB live together
        for tile in tiles:
            vec(tile, tile)

    with pytest.raises(NkiValidationError, match="SBUF overflow"):
        attempt(body, "gen3")
    attempt(body, "gen4")  # 240 KiB fit exactly


def test_dead_tiles_do_not_count():
    def body():
        for _ in range(8):
            vec(sb(128, 20 * 1024), sb(128, 20 * 1024))

    attempt(body, "gen3")


def test_live_psum_overflow_is_refused(monkeypatch):
    def live(count):
        def body():
            banks = [ps(128, 512) for _ in range(count)]
            a, b = sb(128, 128, dtype=BF16), sb(128, 512, dtype=BF16)
            for bank in banks:
                mm(bank, a, b)
            for bank in banks:
                nisa.tensor_copy(dst=sb(128, 512), src=bank)

        return body

    attempt(live(8), "gen3")
    with pytest.raises(NkiValidationError, match="9 banks"):
        attempt(live(9), "gen3")
    monkeypatch.setenv("NKI_DMA_TRANSPOSE_AS_PE_TRANSPOSE", "true")  # reserves one bank from gen3 on
    attempt(live(7), "gen3")
    with pytest.raises(NkiValidationError, match="8 banks"):
        attempt(live(8), "gen3")


def test_report_gives_peaks():
    def kernel():
        tile = sb(128, 1024)
        mm(ps(128, 512), tile[:, 0:128], tile[:, 0:512])

    with nki_emulator.session("gen3") as seen:
        nki_emulator.simulate(nki_emulator.jit(kernel))()
    assert seen.last[0].peak_sbuf_bytes == 4096
    assert seen.last[0].peak_psum_banks == 1


def test_dtypes_without_counterpart_are_refused():
    for array in (np.zeros(4), np.zeros(4, np.int64)):
        with pytest.raises(TypeError, match="no NKI counterpart"):
            nki_emulator.simulate(nki_emulator.jit(lambda x: None))(array)
    assert nl.bfloat16 == np.dtype(ml_dtypes.bfloat16)
