"""Plants one-line bugs in copies of the sources and shows which test catches each.

`make mutants`, or `python tests/mutants.py [NAME ...]` for some, `--list` to see them, `--keep DIR` to keep the copy
and its build for the next run. Each bug is one that a careful engineer could write. The tests named beside it are
few, so that it is quick, and they pass on the unchanged copy first. A C++ bug costs one object: for those the
extension is built hardly optimised, for the scalar instruction set and those that the chosen bugs need; the others use
the installed one. The vector headers are tested by tests/csrc/test_vec.py, which compiles for itself. Bugs that need an
instruction set which this CPU does not run are named and left out.

Exit code 0: every bug was caught by a failing test.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import _copies

INTERPRET = {"TRITON_INTERPRET": "1"}
TIMEOUT_S = 900


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One bug. `objects`: the sources to compile again; `isa`: the instruction set that runs the code, if not any."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]
    objects: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    isa: str = ""


def drawn(op: str, *dtypes: str, backend: str = "cpu") -> tuple[str, ...]:
    """The drawn examples of an operator."""
    return tuple(
        f"tests/test_ops.py::test_agrees_with_the_float64_truth[{op}-{backend}-{d}]" for d in dtypes or ("float32",)
    )


def large(case: str, threads: int = 1) -> tuple[str, ...]:
    """One named case of sizes that drawn examples do not reach."""
    return (f"tests/test_large.py::test_agrees_with_the_float64_truth[{case}-cpu-float32-{threads}]",)


def bench(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_bench.py::{name}" for name in names)


def interpreted(op: str, dtype: str = "float32") -> tuple[str, ...]:
    return (f"tests/test_triton.py::test_agrees_with_the_float64_truth[{op}-{dtype}]",)


def kernels(name: str, chosen: str) -> tuple[str, ...]:
    """Some of the tests of the Triton kernels alone."""
    return (f"tests/triton/test_{name}.py", "-k", chosen)


def vectors(isa: str) -> tuple[str, ...]:
    return (f"tests/csrc/test_vec.py::test_vectors_keep_their_contract[{isa}-True]",)


KERNELS = [
    Mutant(
        "last_lane_left_out",
        "csrc/ops/_rows.h",
        "  if (i < n) f(TailLanes<A>{i, n - i});",
        "  if (i + 1 < n) f(TailLanes<A>{i, n - i});",
        "a tail of one element looks like no tail",
        drawn("softmax"),
        ("softmax",),
    ),
    Mutant(
        "streamed_tail_cut",
        "csrc/ops/_rows.h",
        "  ISOTILE_INLINE void stream(Vec<A> v, T* row) const {\n    v.store(row + i, count);",
        "  ISOTILE_INLINE void stream(Vec<A> v, T* row) const {\n    v.store(row + i, count - 1);",
        "only outputs larger than the last cache are written that way",
        ("tests/csrc/test_rows_kernel.py", "-k", "scalar and softmax_backward"),
    ),
    Mutant(
        "maximum_of_padding",
        "csrc/ops/softmax.cc",
        "  if (i < n) m[1] = select(V::Mask::first(n - i), max(V::load(x + i, n - i), m[1]), m[1]);",
        "  if (i < n) m[1] = max(V::load(x + i, n - i), m[1]);",
        "a masked load gives zeros, which only rows far below zero notice",
        large("softmax_far_below_zero"),
        ("softmax",),
    ),
    Mutant(
        "softmax_rows_start_over",
        "csrc/ops/softmax.cc",
        "  const Scratch<A> kept(keep && !keep_in_place ? n : 0);\n  RowWalker<2> walk({&x, &y}, begin);",
        "  const Scratch<A> kept(keep && !keep_in_place ? n : 0);\n  RowWalker<2> walk({&x, &y}, 0);",
        "right until a second thread begins elsewhere",
        large("softmax", threads=3),
        ("softmax",),
    ),
    Mutant(
        "variance_about_the_guess",
        "csrc/ops/_norm.h",
        "      variance = moments[1] / count - rest * rest;",
        "      variance = moments[1] / count;",
        "the guess is taken for the mean",
        drawn("layer_norm"),
        ("layer_norm",),
    ),
    Mutant(
        "sum_not_rounded",
        "csrc/ops/_norm.h",
        "          x[i] = static_cast<A>(to_accumulator(rounded));",
        "          x[i] = static_cast<A>(x[i]);",
        "the norm is of the rounded sum",
        drawn("layer_norm", "bfloat16"),
        ("layer_norm",),
    ),
    Mutant(
        "weight_offset_forgotten",
        "csrc/ops/_rows.h",
        "    return view.present() && plain<A>(view) && offset == 0;",
        "    return view.present() && plain<A>(view);",
        "a weight that needs no conversion is used where it is",
        drawn("rms_norm"),
        ("rms_norm",),
    ),
    Mutant(
        "mean_of_the_gradient_kept",
        "csrc/ops/_norm_backward.h",
        "      if constexpr (kCentered) d -= mean_wg;",
        "      if constexpr (!kCentered) d -= mean_wg;",
        "which of the two norms subtracts a mean",
        drawn("layer_norm_backward"),
        ("layer_norm_backward",),
    ),
    Mutant(
        "stride_of_the_neighbour",
        "csrc/ops/softmax_backward.cc",
        "        const V v = (at.load(grad + i * grad_stride, u) - dot[u]) * at.load(y + i * y_stride, u);",
        "        const V v = (at.load(grad + i * y_stride, u) - dot[u]) * at.load(y + i * y_stride, u);",
        "both are the same until the layouts differ",
        large("softmax_backward_columns"),
        ("softmax_backward",),
    ),
    Mutant(
        "slope_at_infinity",
        "csrc/ops/matmul_epilogue_backward.cc",
        "    return p.s * fma(finite_factor(z), p.c, V::set1(1));",
        "    return p.s * fma(z, p.c, V::set1(1));",
        "0 times infinity",
        large("epilogue_backward_silu_specials"),
        ("matmul_epilogue_backward",),
    ),
    Mutant(
        "constant_typed_short",
        "csrc/ops/_gemm_epilogue.h",
        "erf(x * V::set1(T(0.70710678118654752440))));",
        "erf(x * V::set1(T(0.7071))));",
        "an error of one part in 10^5",
        drawn("matmul", "float32", "float64"),
        ("matmul",),
    ),
    Mutant(
        "bias_taken_for_dense",
        "csrc/ops/_gemm_epilogue.h",
        "e.bias_dtype, j * e.bias_stride, e.bias_stride, n);",
        "e.bias_dtype, j, e.bias_stride, n);",
        "a strided bias is rare",
        large("matmul_stepped_epilogue"),
        ("matmul",),
    ),
    Mutant(
        "first_chunk_by_panel",
        "csrc/ops/_gemm_run.h",
        "    const Into into = k0 > 0 ? Into::kAdd : Into::kSet;",
        "    const Into into = index > 0 ? Into::kAdd : Into::kSet;",
        "the first panel is the first chunk only for narrow products",
        ("tests/csrc/test_matmul_kernel.py::test_layouts[scalar-dtype0]",),
        ("matmul",),
    ),
    Mutant(
        "last_chunk_missed",
        "csrc/ops/_gemm_run.h",
        "last = k0 + Kind::kChunk >= g.k;",
        "last = k0 + Kind::kChunk > g.k;",
        "wrong only where k is a multiple of the chunk",
        large("matmul_k_768"),
        ("matmul",),
    ),
    Mutant(
        "packed_by_the_first_rows",
        "csrc/ops/_gemm_run.h",
        "        else if (p == p0 && as_it_is(panel))",
        "        else if (p == 0 && as_it_is(panel))",
        "right for the first block of rows",
        ("tests/csrc/test_matmul_kernel.py::test_products_read_in_place_have_the_bits_of_packed_ones[scalar]",),
        ("matmul",),
    ),
    Mutant(
        "rows_of_the_first_chunk",
        "csrc/ops/_gemm_pack.h",
        "(in_place->at(row) + k0) / Kind::kPerStep",
        "in_place->at(row) / Kind::kPerStep",
        "right for every k of one chunk",
        ("tests/csrc/test_matmul_kernel.py::test_products_read_in_place_have_the_bits_of_packed_ones[scalar]",),
        ("matmul",),
    ),
    Mutant(
        "pairs_from_any_row",
        "csrc/ops/_gemm_run.h",
        "    bool all = a.rows.step() % Kind::kPerStep == 0 && ",
        "    bool all = ",
        "right where a row's length is even",
        ("tests/csrc/test_matmul_kernel.py::test_rows_of_halves_of_pairs[avx512_bf16-3]",),
        ("matmul",),
        isa="avx512_bf16",
    ),
    Mutant(
        "pairs_by_the_first_problem",
        "csrc/ops/_gemm_run.h",
        "      source.place(i, &g);\n      all = g.a.offset",
        "      source.place(0, &g);\n      all = g.a.offset",
        "right where problems are an even number of elements apart",
        ("tests/csrc/test_matmul_kernel.py::test_rows_of_halves_of_pairs[avx512_bf16-3]",),
        ("matmul",),
        isa="avx512_bf16",
    ),
    Mutant(
        "pairs_of_an_odd_row",
        "csrc/ops/_gemm_run.h",
        "whole_steps = whole_steps && k % Kind::kPerStep == 0;",
        "whole_steps = whole_steps && k > 0;",
        "what follows a row's last element may be zero",
        ("tests/csrc/test_matmul_kernel.py::test_rows_of_halves_of_pairs[avx512_bf16-3]",),
        ("matmul",),
        isa="avx512_bf16",
    ),
    Mutant(
        "columns_without_the_rest",
        "csrc/ops/_gemm_run.h",
        "const int64_t units = ceil_div(n, unit);",
        "const int64_t units = most(1, n / unit);",
        "right where whole panels of columns are all",
        ("tests/csrc/test_matmul_kernel.py::test_layouts[scalar-dtype0]",),
        ("matmul",),
    ),
    Mutant(
        "in_place_without_chunks",
        "csrc/ops/_gemm_direct.h",
        "  return g.b_n == 1 && k <= FloatKind<float>::kChunk && k * g.n",
        "  return g.b_n == 1 && k * g.n",
        "as exact, but the bits depend on where b is read",
        ("tests/csrc/test_matmul_kernel.py::test_products_read_in_place_have_the_bits_of_packed_ones[scalar]",),
        ("matmul",),
    ),
    Mutant(
        "last_vector_stored_whole",
        "csrc/ops/_gemm_direct.h",
        "      run(g.k, at, g.a.col, b + j, g.b_k, last, y, y_step, true);",
        "      run(g.k, at, g.a.col, b + j, g.b_k, last, y, y_step, false);",
        "what it writes beyond a row, the next row writes over",
        ("tests/csrc/test_matmul_kernel.py::test_products_read_in_place_have_the_bits_of_packed_ones[scalar]",),
        ("matmul",),
    ),
    Mutant(
        "last_vector_loaded_whole",
        "csrc/ops/_gemm_direct.h",
        "V::load(b + v * kLanes, last);",
        "V::load(b + v * kLanes);",
        "no result shows what is read beyond a row",
        ("tests/csrc/test_matmul_kernel.py::test_products_read_in_place_have_the_bits_of_packed_ones[scalar]",),
        ("matmul",),
    ),
    Mutant(
        "rows_of_no_group",
        "csrc/ops/grouped_matmul.cc",
        "  int64_t k(int64_t i) const override { return i < groups ? first.k : 0; }",
        "  int64_t k(int64_t) const override { return first.k; }",
        "rows past the last offset are 0, not the last group's",
        drawn("grouped_matmul"),
        ("grouped_matmul",),
    ),
    Mutant(
        "decreasing_offsets",
        "csrc/ops/_gemm_groups.h",
        "    starts[g + 1] = end > starts[g] ? end : starts[g];",
        "    starts[g + 1] = end;",
        "offsets are data, and data may be wrong",
        ("tests/test_large.py", "-k", "offsets and cpu-1"),
        ("grouped_matmul",),
    ),
    Mutant(
        "causal_by_one",
        "csrc/ops/_attention.h",
        "    if (p->causal) row.hi = min64(row.hi, row.position + 1);",
        "    if (p->causal) row.hi = min64(row.hi, row.position);",
        "whether a query sees its own position",
        drawn("attention"),
        ("attention",),
    ),
    Mutant(
        "sum_not_rescaled",
        "csrc/ops/_attention_softmax.h",
        "    fma(V::load(sum + r, left), V::load(step->factor + r, left), reduce_each_add",
        "    fma(V::load(sum + r, left), V::set1(1), reduce_each_add",
        "shows with a second block of keys and a larger maximum there",
        ("tests/csrc/test_attention_kernel.py", "-k", "scalar"),
        ("attention",),
    ),
    Mutant(
        "outcasts_left_in_place",
        "csrc/ops/attention.cc",
        "      values = bad.collect(values, n_padded, v_words, value_natural);",
        "      bad.collect(values, n_padded, v_words, value_natural);",
        "the cleaned copy was the buffer itself until values were used where they are",
        ("tests/csrc/test_attention_kernel.py", "-k", "hidden_infinity and scalar"),
        ("attention",),
    ),
    Mutant(
        "rows_beyond_the_last_key",
        "csrc/ops/_attention.h",
        "    if (dense && count == padded && count > 0) return source.row(first);",
        "    if (dense) return source.row(first);",
        "what lies behind the values counts for nothing, unless there is no memory",
        ("tests/csrc/test_attention_kernel.py", "-k", "dense and scalar"),
        ("attention",),
    ),
    Mutant(
        "dropout_same_in_every_batch",
        "csrc/ops/_attention.h",
        "head = static_cast<uint32_t>(b * p.hq + row.head);",
        "head = static_cast<uint32_t>(row.head);",
        "a batch of one agrees",
        large("attention_everything"),
        ("attention",),
    ),
    Mutant(
        "softcap_slope",
        "csrc/ops/_attention.h",
        "        if (slope_out) (V::set1(1) - t * t).store(slope_out + i);",
        "        if (slope_out) (V::set1(1) - t).store(slope_out + i);",
        "the derivative of tanh from memory",
        large("attention_backward_everything"),
        ("attention_backward",),
    ),
    Mutant(
        "every_other_column_of_tiles",
        "csrc/ops/_attention.h",
        "static_cast<const char*>(b) + j / 16 * b_next;",
        "static_cast<const char*>(b) + j / 32 * b_next;",
        "right for the first 32 columns",
        ("tests/csrc/test_attention_kernel.py", "-k", "amx"),
        ("attention",),
        isa="amx",
    ),
    Mutant(
        "last_rows_of_tiles",
        "csrc/ops/attention_backward.cc",
        "      last = (last + kWords - 1) / kWords * P::kDepth;",
        "      last = last / kWords * P::kDepth;",
        "rows that do not fill a tile give their keys nothing",
        ("tests/csrc/test_attention_kernel.py", "-k", "test_backward and amx"),
        ("attention_backward",),
        isa="amx",
    ),
    Mutant(
        "dropped_twice",
        "csrc/ops/attention_backward.cc",
        "      V z = prob * (back - d);",
        "      V z = w * (back - d);",
        "the dropped weight for the probability: equal without dropout",
        ("tests/csrc/test_attention_kernel.py", "-k", "test_backward and scalar"),
        ("attention_backward",),
    ),
    Mutant(
        "values_before_the_window",
        "csrc/ops/_attention_decode.h",
        "      for (int64_t j = max64(c0, lo - k0); j < n; j += step) {",
        "      for (int64_t j = c0; j < n; j += step) {",
        "0 times a NaN that no query may see",
        ("tests/test_laws.py", "-k", "decoding_window and float32"),
        ("attention",),
    ),
    Mutant(
        "quantized_nibbles",
        "csrc/ops/_quantized_few_rows.h",
        "part[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);",
        "part[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 3), low);",
        "the high halves of bytes are shifted by three bits",
        ("tests/test_quantized_linear.py::test_integer_products_have_the_references_bits[1-70-300-cpu]",),
        ("quantized_linear",),
        isa="avx512_bf16",
    ),
    Mutant(
        "quantized_start_of_the_first_group",
        "csrc/ops/_quantized_panels.h",
        "const int32_t* of_group = x.sums + g * x.m + row;",
        "const int32_t* of_group = x.sums + row;",
        "every group's zero point is multiplied by the first group's sum of x",
        ("tests/test_quantized_linear.py::test_grouped_integers_are_exact_where_float32_is[cpu-float32]",),
        ("quantized_linear",),
        isa="avx512_bf16",
    ),
    Mutant(
        "quantized_panel_begins_again",
        "csrc/ops/_quantized_panels.h",
        "begins = grouped || k0 == 0, ends",
        "begins = true, ends",
        "the sums of a long row's first part are dropped",
        ("tests/test_quantized_linear.py::test_integer_products_have_the_references_bits[10-35-8300-cpu]",),
        ("quantized_linear",),
        isa="avx512_bf16",
    ),
    Mutant(
        "quantized_panel_of_half_the_codes",
        "csrc/ops/_quantized_panels.h",
        "_mm512_storeu_si512(to + (16 + i) * kStepBytes,",
        "_mm512_storeu_si512(to + i * kStepBytes,",
        "the high halves of bytes take the place of the low ones",
        ("tests/test_quantized_linear.py::test_rows_too_long_to_be_unpacked_at_once[128-True-cpu]",),
        ("quantized_linear",),
        isa="avx512_bf16",
    ),
    Mutant(
        "quantized_sum_of_the_first_group",
        "csrc/ops/_quantized_blocks.h",
        "exact = exact - I::set1(zeros[row]) * I::load(of_x);",
        "exact = exact - I::set1(zeros[row]) * I::load(row_sums + m0 + h);",
        "every group's zero point is multiplied by the first group's sum of x",
        ("tests/test_quantized_linear.py::test_rows_too_long_to_be_unpacked_at_once[32-False-cpu[avx2]]",),
        ("quantized_linear",),
        isa="avx2",
    ),
    Mutant(
        "quantized_words_overflow",
        "csrc/ops/_quantized_blocks.h",
        "const int64_t stop = kBytes ? part + 8 * kPer : end;",
        "const int64_t stop = kBytes ? part + 16 * kPer : end;",
        "16 bits sum twice as many products as they can hold",
        ("tests/test_quantized_linear.py::test_integers_of_the_largest_magnitude[20-cpu[avx2]]",),
        ("quantized_linear",),
        isa="avx2",
    ),
    Mutant(
        "byte_blocks_of_the_first_chunk",
        "csrc/ops/_quantized_byte_blocks.h",
        "length, x + k0 * m + r * kPiece,",
        "length, x + r * kPiece,",
        "right for all k of one chunk",
        ("tests/test_quantized_linear.py::test_integer_products_have_the_references_bits[10-35-8300-cpu]",),
        ("quantized_linear",),
        isa="avx512_bf16",
    ),
    Mutant(
        "byte_blocks_started_by_the_first_row",
        "csrc/ops/quantized_linear.cc",
        "totals[i / kSideOfBytes] : 0",
        "totals[0] : 0",
        "right for equal rows, and where there is no zero point",
        ("tests/test_quantized_linear.py::test_integer_products_have_the_references_bits[10-35-8300-cpu]",),
        ("quantized_linear",),
        isa="avx512_bf16",
    ),
    Mutant(
        "byte_blocks_of_the_first_row",
        "csrc/ops/quantized_linear.cc",
        "pieces.data() + l * m + i * kPiece, rows.data() + i * ld + l",
        "pieces.data() + l * m + i * kPiece, rows.data() + l",
        "every row of bfloat16 is the first",
        ("tests/test_quantized_linear.py::test_offsets_and_every_variant_agree_within_the_bound[cpu]",),
        ("quantized_linear",),
        isa="avx512_bf16",
    ),
    Mutant(
        "quantized_zero_by_the_first_rows_sum",
        "csrc/ops/_quantized_few_rows.h",
        "static_cast<uint32_t>(totals[r])",
        "static_cast<uint32_t>(totals[0])",
        "every row of x takes off its zero point by the sum of the first",
        ("tests/test_quantized_linear.py::test_integer_products_have_the_references_bits[3-17-12000-cpu]",),
        ("quantized_linear",),
        isa="avx512_bf16",
    ),
    Mutant(
        "quantized_sign_of_the_weight",
        "csrc/ops/_quantized_few_rows.h",
        "_mm256_sign_epi8(at, v)",
        "at",
        "the magnitude of a weight is multiplied by x without the weight's sign",
        ("tests/test_quantized_linear.py::test_integer_products_have_the_references_bits[1-70-300-cpu[avx2]]",),
        ("quantized_linear",),
        isa="avx2",
    ),
    Mutant(
        "quantized_half_of_the_part",
        "csrc/ops/_quantized_few_rows.h",
        "code = part < 2 ? byte & I::set1(15)",
        "code = part % 2 == 0 ? byte & I::set1(15)",
        "the second quarter of a piece is read from the high halves of its bytes",
        ("tests/test_quantized_linear.py::test_offsets_and_every_variant_agree_within_the_bound[cpu[avx2]]",),
        ("quantized_linear",),
        isa="avx2",
    ),
    Mutant(
        "quantized_row_of_zeros",
        "csrc/ops/_quantized_rows.h",
        "  if (amax < kLeastAmax) amax = kLeastAmax;\n",
        "",
        "a row of zeros is divided by its largest magnitude",
        ("tests/test_quantized_linear.py::test_dynamic_rows_that_are_zero_tiny_huge_or_not_finite",),
        ("quantized_linear",),
    ),
    Mutant(
        "quantized_gradient_of_the_first_strip",
        "csrc/ops/quantized_linear_backward.cc",
        "dequantize_block<Kind>(&reader, j0, steps, piece0, piece1, block.data());",
        "dequantize_block<Kind>(&reader, j0, steps, 0, piece1 - piece0, block.data());",
        "every strip of columns is multiplied by the first strip's weights",
        ("tests/test_quantized_linear.py::test_gradients_of_every_variant_and_path_agree_within_the_bound[cpu]",),
        ("quantized_linear_backward",),
    ),
    Mutant(
        "quantized_pairs_of_the_first_zero_point",
        "csrc/ops/_quantized_few_rows.h",
        "v % kPerGroup == 0 && own_tables) table = table_of(g);",
        "v % kPerGroup == 0 && own_tables) table = table_of(0);",
        "every group of four-bit weights takes off the first group's zero point",
        ("tests/test_quantized_linear.py::test_offsets_and_every_variant_agree_within_the_bound[cpu]",),
        ("quantized_linear",),
        isa="avx512_bf16",
    ),
    Mutant(
        "quantized_zero_of_the_first_group",
        "csrc/ops/quantized_linear.cc",
        "static_cast<int16_t>(p.w.zero(j, g)) : 0;",
        "static_cast<int16_t>(p.w.zero(j, 0)) : 0;",
        "every group of dynamic integers takes off the first group's zero point",
        ("tests/test_quantized_linear.py::test_grouped_integers_are_exact_where_float32_is[cpu-float32]",),
        ("quantized_linear",),
    ),
    Mutant(
        "quantized_scales_of_the_first_part",
        "csrc/ops/_quantized_bfloat16.h",
        "first = w.groups > 1 ? k0 / w.group : 0;",
        "first = 0;",
        "every 256 elements of a row take the scales of the first 256",
        ("tests/test_quantized_linear.py::test_offsets_and_every_variant_agree_within_the_bound[cpu]",),
        ("quantized_linear",),
        isa="avx512_bf16",
    ),
]

TILES = [
    Mutant(
        "made_rows_of_the_first_chunk",
        "csrc/ops/_gemm_amx.h",
        "g.make_b(g.b, k0 + k, depth,",
        "g.make_b(g.b, k, depth,",
        "every chunk of a gradient's sum multiplies the first chunk's weights",
        ("tests/test_quantized_linear.py::test_gradients_of_every_variant_and_path_agree_within_the_bound[cpu]",),
        ("matmul",),
        isa="amx",
    ),
    Mutant(
        "packed_columns_of_the_first_chunk",
        "csrc/ops/_gemm_pack.h",
        "make(from, first_column + j, columns, first_k + k, count, rows, kAtOnce);",
        "make(from, first_column + j, columns, k, count, rows, kAtOnce);",
        "every chunk of k multiplies the first one of a quantised weight",
        ("tests/test_quantized_linear.py::test_offsets_and_every_variant_agree_within_the_bound[cpu]",),
        ("quantized_linear", "matmul"),
        isa="avx512_bf16",
    ),
    Mutant(
        "made_columns_of_the_first_chunk",
        "csrc/ops/_gemm_amx.h",
        "g.make_b(g.b, l, rows, k0 + from, length,",
        "g.make_b(g.b, l, rows, from, length,",
        "every chunk of k multiplies the first chunk's weights",
        ("tests/test_quantized_linear.py::test_offsets_and_every_variant_agree_within_the_bound[cpu]",),
        ("matmul",),
        isa="amx",
    ),
    Mutant(
        "sums_start_over",
        "csrc/ops/_gemm_amx.h",
        "              const bool add = !first || from > 0;",
        "              const bool add = from > 0;",
        "one chunk of k is all of it, unless both sides are large",
        ("tests/csrc/test_matmul_kernel.py", "-k", "test_many_chunks"),
        ("matmul",),
        isa="amx",
    ),
    Mutant(
        "rows_of_the_last_panel",
        "csrc/ops/_gemm_amx.h",
        "      scope.use(rows_of_last < kPanelSide ? tail_config : kWhole);",
        "      scope.use(kWhole);",
        "whole tiles read beyond the last rows",
        ("tests/csrc/test_matmul_kernel.py", "-k", "test_nothing_beyond and amx"),
        ("matmul",),
        isa="amx",
    ),
    Mutant(
        "parts_in_the_order_of_the_sides",
        "csrc/ops/_gemm_amx.h",
        "      then(!kSwapped, 1);\n      then(kSwapped, 1);\n      then(!kSwapped, 0);",
        "      then(true, 1);\n      then(false, 1);\n      then(true, 0);",
        "as exact, but the bits depend on which operand is packed",
        ("tests/csrc/test_matmul_kernel.py", "-k", "do_not_depend_on_the_batch and amx and dtype2"),
        ("matmul",),
        isa="amx",
    ),
    Mutant(
        "infinity_has_no_rest",
        "csrc/ops/_gemm_run.h",
        "    if (run_tiled<F16Tiles>(list)) redo_not_finite(list);",
        "    run_tiled<F16Tiles>(list);",
        "infinity minus infinity",
        ("tests/csrc/test_matmul_kernel.py", "-k", "nan_and_infinity and amx"),
        ("matmul",),
        isa="amx",
    ),
]

VECTORS = [
    Mutant(
        "ties_rounded_up",
        "csrc/base/dtype.h",
        "    out->bits = static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);",
        "    out->bits = static_cast<uint16_t>((b + 0x8000u) >> 16);",
        "bfloat16 rounding that differs at ties alone",
        vectors("scalar"),
    ),
    Mutant(
        "no_gradual_underflow",
        "csrc/simd/math.h",
        "  const auto vanishes = x < V::set1(-104.0f);",
        "  const auto vanishes = x < V::set1(-88.0f);",
        "where e^x stops being normal, not where it becomes 0",
        vectors("scalar"),
    ),
    Mutant(
        "underflow_forgotten",
        "csrc/simd/math.h",
        "  return select(x < V::set1(-125.0f), V::zero(), y);",
        "  return y;",
        "below the threshold the power of two is made of a sum's other bits",
        vectors("scalar"),
    ),
    Mutant(
        "nan_swallowed",
        "csrc/simd/avx2.h",
        "  const __m256i r = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));",
        "  const __m256i r = _mm256_blendv_epi8(rounded, b, _mm256_castps_si256(nan));",
        "a NaN whose high half is that of infinity",
        vectors("avx2"),
        isa="avx2",
    ),
    Mutant(
        "odd_row_of_a_pair",
        "csrc/simd/tile.h",
        "    const __m256i odd = _mm256_maskz_loadu_epi16(k1 < k ? columns : 0, b + k1 * stride);",
        "    const __m256i odd = _mm256_maskz_loadu_epi16(columns, b + k1 * stride);",
        "the row after the last, where k is odd",
        vectors("amx"),
        isa="amx",
    ),
    Mutant(
        "tiles_of_the_first_configuration",
        "csrc/simd/tile.h",
        "    if (current_ == &config) return;",
        "    if (current_ != nullptr) return;",
        "a second configuration in one scope",
        vectors("amx"),
        isa="amx",
    ),
]

PYTHON = [
    Mutant(
        "batch_invariance_of_columns",
        "python/isotile/backends/cpu.py",
        "            request.state.batch_invariant\n            and lowered.kernel in COLUMN_KERNELS",
        "            False\n            and lowered.kernel in COLUMN_KERNELS",
        "rows side by side in memory are summed in another order than one alone",
        ("tests/test_laws.py", "-k", "softmax_of_columns"),
    ),
    Mutant(
        "loop_dimensions_of_lengths",
        "python/isotile/ops/attention.py",
        "torch.broadcast_shapes(scores.shape, visible.shape, (*a.value.shape[:-3], 1, 1, 1))",
        "scores.shape",
        "right while query has every loop dimension",
        ("tests/test_reference.py", "-k", "loop_dimensions_broadcast"),
    ),
    Mutant(
        "draws_of_this_version_only",
        "python/isotile/testing/draws.py",
        "        return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)",
        "        return torch.from_numpy((words >> np.uint64(12)) * 2.0**-52)",
        "inputs as good as before, and not the same bits as on the other machine",
        ("tests/test_draws.py", "-k", "pinned"),
    ),
    Mutant(
        "nan_is_no_difference",
        "python/isotile/testing/equivalence.py",
        "        share = torch.where(kind, share, math.inf)\n",
        "",
        "a kernel that swallows NaN",
        ("tests/test_equivalence.py", "-k", "drops_nan or found"),
    ),
    Mutant(
        "sum_of_the_bounds_twice",
        "python/isotile/verify/compare.py",
        "torch.tensor(allowed, dtype=torch.float64).mean(0)",
        "torch.tensor(allowed, dtype=torch.float64).sum(0) * 1e6",
        "two machines that differ by more than both may",
        ("tests/test_verify.py", "-k", "something_else"),
    ),
    Mutant(
        "digest_of_a_part",
        "python/isotile/verify/report.py",
        "        whole = sha256(plain)",
        '        whole = given["report"]',
        "another machine's name over the same results",
        ("tests/test_verify.py", "-k", "no_whole_report"),
    ),
    Mutant(
        "broadcast_stride_kept",
        "python/isotile/shapes.py",
        "            strides.append(stride if have == want and have != 1 else 0)",
        "            strides.append(stride)",
        "a dimension of size 1 that is repeated",
        drawn("matmul"),
    ),
    Mutant(
        "loops_merged_too_early",
        "python/isotile/shapes.py",
        "            if all(v.strides[last] == v.strides[d] * sizes[d] for _, v in active):",
        "            if any(v.strides[last] == v.strides[d] * sizes[d] for _, v in active):",
        "dimensions merge only if they do in every tensor",
        drawn("layer_norm"),
    ),
    Mutant(
        "normalised_group_by_size",
        "python/isotile/shapes.py",
        "        if total and outer != inner_size * inner:",
        "        if total and outer < inner_size * inner:",
        "a gap between the rows of a normalised group",
        drawn("layer_norm"),
    ),
    Mutant(
        "plans_without_strides",
        "csrc/signature.cc",
        "      std::memcpy(at + t.ndim, t.strides, bytes);",
        "      std::memset(at + t.ndim, 0, bytes);",
        "two layouts of one shape share a plan",
        ("tests/test_dispatch.py", *drawn("softmax")),
        objects=("signature",),
    ),
    Mutant(
        "described_without_strides",
        "python/isotile/fast_path.py",
        "(t.shape, t.stride(), t.dtype, t.device) for t",
        "(t.shape, t.dtype, t.device) for t",
        "likewise where PyTorch's table does not tell of the tensors",
        ("tests/test_dispatch.py", "-k", "signatures"),
    ),
    Mutant(
        "negated_counts_as_plain",
        "csrc/signature.cc",
        "    return negated < 0 ? -1 : !negated;",
        "    return negated < 0 ? -1 : 1;",
        "a kernel reads numbers whose negation is pending",
        ("tests/test_dispatch.py", "-k", "signatures"),
        objects=("signature",),
    ),
    Mutant(
        "short_way_without_gradient",
        "python/isotile/fast_path.py",
        """        needs.append(f"({n} is not None and {needs_grad})" if n in optional else needs_grad)""",
        """        needs.append("False" if n in optional else needs_grad)""",
        "only an optional argument needs a gradient",
        ("tests/test_dispatch.py", "-k", "short_way and optional_argument"),
    ),
    Mutant(
        "plans_without_state",
        "python/isotile/library.py",
        "            overload,\n            CURRENT.get(),\n",
        "            overload,\n",
        "a plan made under one choice serves another",
        ("tests/test_errors.py", "-k", "chosen_backend"),
    ),
    Mutant(
        "out_checked_by_rank",
        "python/isotile/dispatch.py",
        "        if tuple(out.shape) != tuple(want.shape):",
        "        if len(out.shape) != len(want.shape):",
        "as many dimensions is not the same shape",
        ("tests/test_errors.py", "-k", "wrong_out"),
    ),
    Mutant(
        "overlap_by_start",
        "python/isotile/library.py",
        "if any(first < b and a < end and device",
        "if any(first == a and device",
        "out= that begins inside an input",
        ("tests/test_errors.py", "-k", "may_not_lie"),
    ),
    Mutant(
        "gradient_under_another_choice",
        "python/isotile/library.py",
        "        token = CURRENT.set(state)",
        "        token = CURRENT.set(CURRENT.get())",
        "the backward runs after the context of the forward",
        ("tests/test_grad.py", "-k", "state"),
    ),
    Mutant(
        "vmap_leaves_the_dimension",
        "python/isotile/ops/softmax.py",
        '    return {"dim": scalars.dim if scalars.dim < 0 else scalars.dim + 1}',
        '    return {"dim": scalars.dim}',
        "a positive dim moves when a dimension is added in front",
        ("tests/test_library.py", "-k", "vmap and softmax"),
    ),
    Mutant(
        "residual_behind_the_activation",
        "python/isotile/ops/matmul.py",
        '    found = {"residual": grad}',
        '    found = {"residual": grad_z}',
        "the residual is added after the activation",
        ("tests/test_grad.py", "-k", "matmul and derivative"),
    ),
    Mutant(
        "bottom_right_of_the_padding",
        "python/isotile/ops/attention.py",
        "    offset = limit - queries if",
        "    offset = keys - queries if",
        "the last key is seqlens_k's, not the tensor's",
        drawn("attention"),
    ),
    Mutant(
        "seven_rounds_of_philox",
        "python/isotile/ops/_philox.py",
        "    for _ in range(10):",
        "    for _ in range(7):",
        "Philox4x32-7 exists, and is random enough",
        large("attention_everything"),
    ),
    Mutant(
        "eps_of_the_dtype",
        "python/isotile/ops/_norm.py",
        "    return torch.finfo(wide).eps if eps is None else eps",
        "    return torch.finfo(dtype).eps if eps is None else eps",
        "every backend agrees, and PyTorch does not",
        ("tests/test_reference.py", "tests/test_nn.py"),
    ),
    Mutant(
        "panels_as_one_matrix",
        "csrc/ops/_gemm_pack.h",
        "const int64_t column = g.b_panel != 0 ? j / kPanelColumns * g.b_panel + j % kPanelColumns : j * g.b_n;",
        "const int64_t column = j * g.b_n;",
        "the first panel is all that most small weights have",
        ("tests/test_constant_weight.py::test_every_instruction_set_reads_panels",),
        ("matmul",),
    ),
    Mutant(
        "pairs_of_the_even_elements",
        "csrc/ops/_gemm_pack.h",
        "p[j] >> (s % 2 * 16)",
        "p[j]",
        "only instruction sets without bfloat16 products take pairs apart",
        ("tests/test_constant_weight.py::test_every_instruction_set_reads_panels",),
        ("matmul",),
    ),
    Mutant(
        "sums_of_one_block_of_a_panel",
        "csrc/ops/_gemm_few_rows.h",
        "k == 0 ? Into::kSet : Into::kContinue",
        "Into::kSet",
        "up to six rows have a block as long as a chunk",
        ("tests/test_constant_weight.py::test_every_instruction_set_reads_panels",),
        ("matmul",),
    ),
    Mutant(
        "panels_without_their_padding",
        "python/isotile/ops/packed_linear.py",
        "(0, steps * step - k, 0, blocks * PANEL_COLUMNS - n)",
        "(0, steps * step - k, 0, blocks * PANEL_COLUMNS - n), value=1.0",
        "what is padded is thrown away, but for the odd element of a pair",
        ("tests/test_constant_weight.py::test_panels",),
    ),
    Mutant(
        "constant_weight_of_an_old_version",
        "python/isotile/nn.py",
        "state = (weight.data_ptr(), weight._version, _latest_step, signature)",
        "state = (weight.data_ptr(), _latest_step, signature)",
        "the weight is still where it was",
        ("tests/test_constant_weight.py::test_every_update_is_noticed",),
    ),
    Mutant(
        "constant_weight_before_a_fused_step",
        "python/isotile/nn.py",
        "state = (weight.data_ptr(), weight._version, _latest_step, signature)",
        "state = (weight.data_ptr(), weight._version, signature)",
        "every optimizer counts versions, but for the fused ones",
        ("tests/test_constant_weight.py::test_every_update_is_noticed",),
    ),
    Mutant(
        "constant_weight_at_an_old_address",
        "python/isotile/nn.py",
        "packed.weight is weight and packed.state == state",
        "packed.state == state",
        "an address and a version name a tensor, while it lives",
        ("tests/test_constant_weight.py::test_every_update_is_noticed",),
    ),
    Mutant(
        "scale_of_the_value",
        "python/isotile/ops/attention.py",
        "    return 1 / math.sqrt(max(a.query.shape[-1], 1)) if a.scale is None else a.scale",
        "    return 1 / math.sqrt(max(a.value.shape[-1], 1)) if a.scale is None else a.scale",
        "head_dim and value_dim are mostly equal",
        ("tests/test_reference.py", *drawn("attention")),
    ),
    Mutant(
        "every_change_is_noise",
        "python/isotile/bench/compare.py",
        "        return self.ratio > threshold and self.low > 1 and",
        "        return self.ratio > threshold and self.low > threshold * 1e6 and",
        "a comparison that never fails looks like a good day",
        bench("test_planted_slow_kernel_is_flagged_by_compare", "test_compare_needs_more_than_noise"),
    ),
    Mutant(
        "wrong_kernels_are_timed",
        "python/isotile/bench/runner.py",
        "                if not agreement.ok:",
        "                if not agreement.ok and not contender.ours:",
        "the table looks better with it",
        bench("test_planted_wrong_kernel_gets_no_figure"),
    ),
    Mutant(
        "recorded_strides_are_lost",
        "python/isotile/testing/recipes.py",
        '        if "strides" in described:',
        '        if "strides" in described and not described["strides"]:',
        "contiguous copies agree as well, and are faster",
        bench("test_recorded_calls_are_built_again_exactly"),
    ),
    Mutant(
        "a_token_costs_a_call",
        "python/isotile/bench/money.py",
        "a_call / tokens * 1e9 if tokens else None",
        "a_call * 1e9 if tokens else None",
        "the same for a decode of one sequence",
        bench("test_price_gives_the_cost_of_calls_and_tokens"),
    ),
    Mutant(
        "options_dropped_for_a_rival",
        "python/isotile/bench/rivals.py",
        "    return bool(value)",
        "    return False",
        "the rival is faster without the soft cap",
        bench("test_rival_says_what_it_does_not_take", "test_options_of_a_case_reach_the_public_function"),
    ),
    Mutant(
        "quantized_model_in_half",
        "python/isotile/quantization.py",
        "return found if found.dtype == tensor.dtype else tensor.to(found.device)",
        "return found",
        "model.half() rewrites the scales",
        ("tests/test_quantized_linear.py::test_a_change_of_dtype_leaves_the_weight_alone",),
    ),
    Mutant(
        "gptq_zero_points_as_stored",
        "python/isotile/importers.py",
        'to(torch.int16) + (1 if checkpoint_format == "gptq" else 0)',
        "to(torch.int16)",
        "GPTQ stores zero points less one",
        ("tests/test_quantized_linear.py::test_gptq",),
    ),
]

TRITON = [
    Mutant(
        "padding_is_zero",
        "kernels/triton/softmax.py",
        'strides[3], mask=mask, other=-float("inf")\n',
        "strides[3], mask=mask, other=0.0\n",
        "as in the C++ kernel: only rows far below zero notice",
        interpreted("softmax"),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "dot_without_accumulator",
        "kernels/triton/matmul.py",
        "        acc = tl.dot(a, b, acc, input_precision=PRECISION)",
        "        acc = tl.dot(a, b, input_precision=PRECISION)",
        "one block of k is enough for small tests",
        interpreted("matmul"),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "triton_bottom_right",
        "kernels/triton/attention.py",
        "    offset = keys - sq if BOTTOM_RIGHT else 0",
        "    offset = sk - sq if BOTTOM_RIGHT else 0",
        "the last key is seqlens_k's, not the tensor's",
        interpreted("attention"),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "triton_quantized_second_run_beyond_k",
        "kernels/triton/quantized_linear.py",
        "k % (RUN if how.bits == 4 else depth) == 0 or",
        "k % depth == 0 or",
        "a four-bit step's second run is read where x has ended",
        ("tests/test_triton.py::test_grouped_integers_are_exact_where_float32_is",),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "triton_halves_swapped",
        "kernels/triton/quantized_linear.py",
        "                    half = code >> 4 if run == 1 else code & 15",
        "                    half = code >> 4 if run == 0 else code & 15",
        "which element is in the low half of a byte differs between formats",
        interpreted("quantized_linear"),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "triton_activations_rounded_up",
        "kernels/triton/quantized_linear.py",
        "            q = (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)",
        "            q = (v + 0.5).to(tl.int32).to(tl.int8)",
        "half to even, and below zero too",
        ("tests/triton/test_quantized_linear.py::test_rows_are_quantised_to_the_same_bits",),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "triton_partial_sums_forgotten",
        "kernels/triton/quantized_linear.py",
        "        acc += tl.load(partial_ptr + part * step + at, mask=mask, other=0)",
        "        acc = tl.load(partial_ptr + part * step + at, mask=mask, other=0)",
        "only shapes that split k have more than one",
        ("tests/triton/test_quantized_linear.py::test_every_format_under_every_configuration",),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "repair_of_hidden_pairs",
        "kernels/triton/_attention.py",
        "                pairs = visible & (lane == row - begin)[None, :]",
        "                pairs = (lane == row - begin)[None, :] & (weight == weight)",
        "only where a hidden value is not finite, and only on the path that repairs",
        kernels("attention", "hidden_values"),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "kept_pairs_unscaled_in_the_value_gradient",
        "kernels/triton/attention_backward.py",
        "            dropped = p * tl.where(keep, keep_scale, 0.0)  # a NaN stays one when dropped",
        "            dropped = p * tl.where(keep, 1.0, 0.0)  # a NaN stays one when dropped",
        "the other two gradients are right",
        kernels("attention", "gradients and dropout"),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "first_part_left_out",
        "kernels/triton/matmul.py",
        "    for part in range(SPLIT_K):",
        "    for part in range(1, SPLIT_K):",
        "only split products pass here",
        kernels("matmul", "exact and dtype0 and nn"),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "next_matrix_in_the_tail",
        "kernels/triton/_matmul_descriptor.py",
        '        if not how[0] and view is b and how[3] and k % meta["BLOCK_K"]:',
        '        if not how[0] and view is b and how[3] and k % meta["BLOCK_K"] and k < 0:',
        "zero times the next matrix's rows is zero, unless they are NaN",
        kernels("matmul", "next_matrix"),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "lanes_of_equal_weight",
        "kernels/triton/_norm.py",
        "        square += drift * drift * weight",
        "        square += drift * drift",
        "Welford's merge: lanes that agree hide it, and so do rows of one chunk",
        kernels("norms", "norm_matches and layer_norm and dtype0"),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "group_of_a_boundary_tile",
        "kernels/triton/_grouped.py",
        "    group = tl.sum((before <= tile_m).to(tl.int32), axis=0)",
        "    group = tl.sum((before < tile_m).to(tl.int32), axis=0)",
        "the first tile of every group but the first",
        interpreted("grouped_matmul"),
        env=tuple(INTERPRET.items()),
    ),
    Mutant(
        "model_over_measurement",
        "python/isotile/tuning/__init__.py",
        '        if old is None or not (old["source"] == "measured" and entry["source"] == "modelled"):',
        '        if old is None or entry["config"]:',
        "a modelled entry must not take the place of a measured one",
        ("tests/test_tuning.py", "-k", "writing"),
    ),
    Mutant(
        "journal_of_other_kernels",
        "python/isotile/tuning/search.py",
        '            if record.get("context") == context:',
        '            if record.get("context"):',
        "times of kernels that were edited since",
        ("tests/test_tuning.py", "-k", "measured_again"),
    ),
]

NKI = [
    Mutant(
        "nki_sums_past_24_bits",
        "kernels/nki/quantized_linear.py",
        "EXACT = 1024  #",
        "EXACT = 8192  #",
        "integers in float32 look exact until they are large",
        ("tests/nki/test_quantized_linear.py::test_integer_sums_are_exact_beyond_24_bits",),
    ),
    Mutant(
        "nki_quotient_of_a_reciprocal",
        "kernels/nki/quantized_linear.py",
        "    for _ in range(2):\n        q_high",
        "    for _ in range(0):\n        q_high",
        "a / b is not a * (1 / b)",
        ("tests/nki/test_quantized_linear.py::test_rows_are_quantised_to_the_same_bits",),
    ),
    Mutant(
        "nki_mean_square",
        "kernels/nki/_norm.py",
        "dst=mean_square, data=total, op0=nl.multiply, operand0=1.0 / n)",
        "dst=mean_square, data=total, op0=nl.multiply, operand0=1.0 / (n - 1))",
        "the unbiased estimate",
        ("tests/nki/test_kernels.py", "-k", "float64 and gen3x1 and rms_norm and float32 and not backward"),
    ),
    Mutant(
        "nki_tail_column",
        "kernels/nki/softmax.py",
        "    nisa.activation(dst=y[:, cut:n], op=nl.copy, data=power[:, cut:n], scale=inverse)",
        "    nisa.activation(dst=y[:, cut : n - 1], op=nl.copy, data=power[:, cut : n - 1], scale=inverse)",
        "an inclusive end",
        ("tests/nki/test_kernels.py", "-k", "float64 and gen3x1 and softmax and float32 and not backward"),
    ),
]

#: The instruction sets besides scalar.
SETS = ("avx2", "avx512", "avx512_bf16", "amx", "neon")
MUTANTS = {m.name: m for m in (*KERNELS, *TILES, *VECTORS, *PYTHON, *TRITON, *NKI)}


class Workshop:
    """An unchanged copy of the sources with its extension, and copies with one bug each."""

    def __init__(self, folder: Path, chosen: list[Mutant]) -> None:
        self.folder = folder
        self.clean = folder / "clean"
        self.build = folder / "build"
        if self.clean.exists():
            shutil.rmtree(self.clean)
        _copies.copy_sources(self.clean)
        self.built = self.build / f"_C{_copies.SUFFIX}"
        self.installed = _copies.installed_extension()
        if any(m.objects for m in chosen):
            needed = {m.isa for m in chosen if m.objects}
            sets = {f"ISOTILE_COMPILES_{name}": "ON" if name in needed else "OFF" for name in SETS}
            _copies.configure(self.clean, self.build, CMAKE_BUILD_TYPE="Debug", CMAKE_CXX_FLAGS_DEBUG="-O1", **sets)
            command = [_copies.tool("cmake"), "--build", str(self.build), "--parallel", "2"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"the unchanged copy does not build:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")

    def extension_for(self, mutant: Mutant) -> Path:
        """The unchanged extension that goes with a bug's tests."""
        return self.built if mutant.objects else self.installed

    @contextlib.contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[tuple[Path, Path]]:
        """(sources, extension) with the bug."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            tree = Path(scratch) / "tree"
            shutil.copytree(self.clean, tree, ignore=shutil.ignore_patterns(".site"))
            path = tree / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                raise Broken(f"{mutant.file} holds the old text {text.count(mutant.old)} times")
            path.write_text(text.replace(mutant.old, mutant.new))
            extension = self.extension_for(mutant)
            if mutant.objects:
                extension = Path(scratch) / f"_C{_copies.SUFFIX}"
                self.relink(tree, Path(scratch), mutant.objects, extension)
            yield tree, extension

    def relink(self, tree: Path, scratch: Path, names: tuple[str, ...], extension: Path) -> None:
        """The extension with the objects of some kernels compiled from `tree`."""
        objects, compiler = [], ""
        for entry in json.loads((self.build / "compile_commands.json").read_text()):
            words = shlex.split(entry["command"])
            compiler, output = words[0], words[words.index("-o") + 1]
            source = Path(entry["file"])
            if source.stem in names:
                changed = str(scratch / f"{source.stem}-{len(objects)}.o")  # one for each instruction set
                moved = [w.replace(str(self.clean), str(tree)) for w in words]
                moved = [changed if w == output else w for w in moved]
                done = subprocess.run(moved, cwd=entry["directory"], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise Broken(f"does not compile: {done.stderr[-2000:]}")
                output = changed
            objects.append(str(Path(entry["directory"]) / output))
        done = subprocess.run(
            [compiler, "-shared", "-o", str(extension), *objects], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Broken(f"does not link: {done.stderr[-2000:]}")

    def test(self, tree: Path, extension: Path, mutant: Mutant, stop_at_first: bool) -> tuple[int, str]:
        """pytest's exit code and output for a mutant's tests in a tree."""
        site = tree / ".site"
        _copies.lay_out(site, tree, extension)
        env = _copies.environment(site, **dict(mutant.env))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line"]
        command += ["-x"] if stop_at_first else []
        done = subprocess.run(
            [*command, *mutant.tests], cwd=tree, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        return done.returncode, done.stdout + done.stderr


class Broken(Exception):
    """A bug that could not be planted: its text is gone, or it does not compile."""


def catcher(output: str) -> str:
    """The first failed test in pytest's output."""
    found = re.search(r"^(?:FAILED|ERROR) (\S+?::\S+)", output, re.MULTILINE)
    return found.group(1).split("/", 1)[-1] if found else "?"


def verdict(workshop: Workshop, mutant: Mutant) -> tuple[bool, str]:
    """Whether the bug was caught, and by which test."""
    try:
        with workshop.mutated(mutant) as (tree, extension):
            code, output = workshop.test(tree, extension, mutant, stop_at_first=True)
    except Broken as error:
        return False, f"NOT PLANTED: {error}"
    except subprocess.TimeoutExpired:
        return False, f"no verdict within {TIMEOUT_S} s"
    if code == 1:
        return True, catcher(output)
    if code < 0:
        running = re.search(r"/(test_\w+\.py)\", line \d+ in (test_\w+|agrees)", output)  # pytest's faulthandler
        return True, f"crash (signal {-code}) in {'::'.join(running.groups()) if running else '?'}"
    if code == 0:
        return False, "SURVIVED"
    return False, f"NO VERDICT: pytest's exit code {code}: {output[-600:]}"


def failing_unchanged(workshop: Workshop, chosen: list[Mutant]) -> dict[str, str]:
    """The chosen bugs whose tests already fail on the unchanged copy, and their output."""
    done: dict[tuple, str | None] = {}
    for mutant in chosen:
        key = (mutant.tests, mutant.env, bool(mutant.objects))
        if key not in done:
            code, output = workshop.test(workshop.clean, workshop.extension_for(mutant), mutant, stop_at_first=False)
            site = workshop.clean / ".site"
            _copies.check_import(site, _copies.environment(site, **dict(mutant.env)))
            done[key] = None if code == 0 else f"pytest's exit code {code}\n{output[-2000:]}"
    outputs = {m.name: done[m.tests, m.env, bool(m.objects)] for m in chosen}
    return {name: output for name, output in outputs.items() if output is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="the bugs to plant; all if none is named")
    parser.add_argument("--list", action="store_true", help="list the bugs and stop")
    parser.add_argument("--keep", type=Path, help="keep the copy and its build in this folder, for the next run")
    given = parser.parse_args()
    unknown = [n for n in given.names if n not in MUTANTS]
    if unknown:
        parser.error(f"no bug named {', '.join(unknown)}; --list shows them")
    chosen = [MUTANTS[n] for n in given.names or MUTANTS]
    if given.list:
        for m in chosen:
            print(f"{m.name:<32} {m.file:<40} {m.why}")
        return 0
    runs = {"", *_copies.instruction_sets()}
    for mutant in [m for m in chosen if m.isa not in runs]:
        print(f"{mutant.name}: left out, this CPU does not run {mutant.isa}")
    chosen = [m for m in chosen if m.isa in runs]
    with contextlib.ExitStack() as stack:
        if given.keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isotile-mutants-")))
        else:
            folder = given.keep.resolve()
            folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        workshop = Workshop(folder, chosen)
        built = time.monotonic()
        print(f"unchanged copy: made in {built - began:.0f} s", flush=True)
        failing = failing_unchanged(workshop, chosen)
        for name, output in failing.items():
            print(f"the tests of {name} fail on the unchanged copy: {output}")
        print(f"unchanged copy: its tests took {time.monotonic() - built:.0f} s", flush=True)
        survivors = list(failing)
        print(f"{'bug':<32} {'file':<40} {'s':>5}  caught by", flush=True)
        for mutant in [m for m in chosen if m.name not in failing]:
            start = time.monotonic()
            caught, by = verdict(workshop, mutant)
            if not caught:
                survivors.append(mutant.name)
            print(f"{mutant.name:<32} {mutant.file:<40} {time.monotonic() - start:>5.0f}  {by}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} bugs caught" + (f"; not: {survivors}" if survivors else ""))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
