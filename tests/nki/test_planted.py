"""Bugs planted in the emulator and in the kernels, each caught by a test that is named for it."""

# ruff: noqa: E501
from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import pathlib
import sys
import textwrap

import pytest

HERE = pathlib.Path(__file__).parent
_spec = importlib.util.spec_from_file_location("nki_adapter", HERE / "adapter.py")
adapter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(adapter)

EMULATOR, KERNELS = "isotile.nki_emulator.", "isotile.kernels.nki."

# (module.function, right, wrong, the test that must fail)
IN_EMULATOR = [
    ("compute._apply", "if reverse else", "if not reverse else", "test_tensor_scalar_reverse_swaps_each_operation"),
    (
        "compute.scalar_tensor_tensor",
        "other, value) if reverse1 else",
        "other, value) if not reverse1 else",
        "test_scalar_tensor_tensor_second_operation_takes_the_tile",
    ),
    ("compute.tensor_reduce", "-result if negate", "result if negate", "test_negated_reduction_negates_the_result"),
    ("matmul._into_psum", "(now & PSUM_OPEN) != 0", "(now & PSUM_WRITTEN) != 0", "test_accumulation_starts_over_on_a_reused_tile"),
    ("dtypes.from_float32", "np.rint(", "np.trunc(", "test_float_to_int_rounds_half_even_and_saturates"),
    ("dtypes.poison", "np.nan", "0.0", "test_fresh_memory_is_poison"),
    ("compute._match8", " & ~used", "", "test_max8_find_and_replace_with_ties"),
    (
        "rules.accumulate",
        "np.asarray(partial, np.float32).reshape(-1)",
        "2 * np.asarray(partial, np.float32).reshape(-1)",
        "test_activation_multiplies_then_adds_and_counts_once",
    ),
    ("compute.range_select", "np.arange(range_start, range_start + dst.free", "np.arange(0, dst.free", "test_range_select_bounds_and_running_max"),
    ("dma.dma_transpose", "values.transpose(wanted)", "values.transpose(wanted[::-1])", "test_dma_transposes_have_fixed_axes"),
    ("matmul.quantize_mx", "(_EMAX[dst.dtype.name] - 1)", "_EMAX[dst.dtype.name]", "test_mx_scale_bytes_follow_the_largest_of_32"),
    ("compute.bn_aggr", "square + count * np.square(mean - middle)", "square", "test_bn_aggr_of_halves_with_differing_means"),
    ("compute.tensor_tensor", 'elif wide and where == "gpsimd"', 'elif wide and where == "none"', "test_integers_are_exact_only_on_gpsimd"),
    ("tensor.NkiTensor._numpy", "base % self.row + last >= self.row", "base % self.row + last < 0", "test_other_limit_is_refused[ap_into_next_partition]"),
    ("matmul.nc_matmul", "moving.array(32)", "moving.array(16)", "test_indirect_elements_snake_over_the_engines_group[32]"),
    ("rules.not_both_psum", "a.buffer is PSUM and", "False and", "test_limit_is_refused[both_psum]"),
]  # fmt: skip
IN_KERNELS = [
    ("_norm._inverse_deviation", "constant(p, 1, eps,", "constant(p, 1, 0.0,", "test_rms_norm_of_wide_rows[gen3x1]"),
    ("_norm._apply", "op0=nl.subtract, operand0=mean, op1=nl.multiply, operand1=w", "op0=nl.add, operand0=mean, op1=nl.multiply, operand1=w", "test_layer_norm_of_wide_rows[gen3x1]"),
    ("_norm._centred_stats", "value=float(count)", "value=float(count + 64)", "test_layer_norm_of_wide_rows[gen3x1]"),
    ("_tiles.add_other_core", "nl.num_programs(0) == 2", "nl.num_programs(0) == 3", "test_norm_gradients_over_several_row_tiles[gen3x2]"),
    ("softmax._minus_top", "negate=True", "negate=False", "test_softmax_of_rows_wider_than_sbuf_keeps[gen3x1]"),
    ("matmul._epilogue", "op=_activation_op(activation), data=z", "op=_activation_op(activation), data=product_psum", "test_matmul_epilogue[gen3x1-relu]"),
    ("matmul._activation_op", "return nl.gelu_apprx_tanh", "return nl.gelu_apprx_sigmoid", "test_matmul_epilogue[gen3x1-gelu_tanh]"),
    ("_grouped._row_indices", "op=nl.greater_equal", "op=nl.greater", "test_grouped_matmul_with_empty_and_cut_groups[gen3x1]"),
    ("attention.block_kind", "if k0 > last + right:", "if k0 > first + right:", "test_attention_over_several_sections[gen3x1]"),
    ("attention._query_tile", "dst=acc, data=acc, op0=nl.multiply, operand0=shrink", "dst=acc, data=acc, op0=nl.multiply, operand0=1.0", "test_attention_over_several_sections[gen3x1]"),
    ("attention.query_bounds", "operand0=float(sk - sq)", "operand0=float(sk - sq - 1)", "test_attention_over_several_sections[gen3x1]"),
    ("attention.drop_past_end", "if not options", "if options", "test_attention_decode_packs_the_heads_of_a_group[gen3x1]"),
    ("attention_backward.attention_backward_kernel", "grad_k[(c - s0) // 128], options[\"scale\"])", "grad_k[(c - s0) // 128], 1.0)", "test_attention_gradients[gen3x1]"),
    ("attention_backward.attention_backward_kernel", "if s0 > key_first:", "if s0 > key_last:", "test_attention_gradients_in_key_sections_and_split_over_cores[gen3x1]"),
    ("attention_backward.attention_backward_kernel", "load(partial_hbm[1, h, q0:q1]", "load(partial_hbm[0, h, q0:q1]", "test_attention_gradients_in_key_sections_and_split_over_cores[gen3x2]"),
    ("_philox._product", "_bits(cross, nl.right_shift, 16), nl.add)", "_bits(cross, nl.right_shift, 15), nl.add)", "test_attention_dropout_draws_the_mask_of_every_backend[gen3x1]"),
    ("_norm.norm_backward_wide_kernel", "-1.0 / n))", "-1.0))", "test_norms_of_rows_wider_than_sbuf_keeps[gen3x1]"),
    ("_grouped.grouped_kernel", "data1=before[:, c:stop], data2=bank", "data1=bank, data2=bank", "test_grouped_matmul_of_a_contraction_wider_than_sbuf_keeps[gen3x1]"),
]  # fmt: skip


@contextlib.contextmanager
def planted(prefix, target, right, wrong):
    """Replace one function everywhere it is known by a copy with a bug."""
    module_name, *owner, name = target.split(".")
    module = importlib.import_module(prefix + module_name)
    holder = getattr(module, owner[0]) if owner else module
    function = getattr(holder, name)
    source = textwrap.dedent(inspect.getsource(getattr(function, "func", function)))
    flat = " ".join(source.split())
    assert " ".join(right.split()) in flat or right in source, f"{target} no longer says {right!r}"
    if right not in source:  # written over several lines
        source = source.replace("(\n", "(").replace(",\n", ", ")
        source = "\n".join(_joined(source))
        assert right in source, f"{target} no longer says {right!r} on one line"
    space = dict(module.__dict__)
    exec(compile(source.replace(right, wrong), module.__file__, "exec"), space)
    holders = (
        [holder]
        if owner
        else [
            m for n, m in list(sys.modules.items()) if n.startswith("isotile.") and getattr(m, name, None) is function
        ]
    )
    for holder in holders:
        setattr(holder, name, space[name])
    made = space[name]
    getattr(made, "func", made).__globals__[name] = made
    try:
        yield
    finally:
        for holder in holders:
            setattr(holder, name, function)


def _joined(source):
    for line in source.split("\n"):
        head = line[: len(line) - len(line.lstrip())]
        yield head + " ".join(line.split())


def fails(test):
    files = (
        ["test_kernels.py"]
        if "[gen" in test
        else ["test_instructions.py", "test_limits.py", "test_tensors.py", "test_styles.py"]
    )
    name = test.split("[")[0]
    path = next(HERE / f for f in files if f"def {name}(" in (HERE / f).read_text())
    status = pytest.main([f"{path}::{test}", "-q", "-x", "--no-header", "--tb=no", "-p", "no:cacheprovider"])
    assert status in (0, 1), f"{test} did not run"
    return status == 1


@pytest.mark.parametrize("bug", IN_EMULATOR, ids=[b[0] for b in IN_EMULATOR])
def test_planted_emulator_bug_is_caught(bug):
    target, right, wrong, test = bug
    with planted(EMULATOR, target, right, wrong):
        assert fails(test), f"{test} passes with the bug in {target}"


@pytest.mark.parametrize("bug", IN_KERNELS, ids=[f"{b[0]}-{i}" for i, b in enumerate(IN_KERNELS)])
def test_planted_kernel_bug_is_caught(bug):
    target, right, wrong, test = bug
    with planted(KERNELS, target, right, wrong):
        assert fails(test), f"{test} passes with the bug in {target}"
