"""Specs are whole, their cases are legal, and an operator dropped in as one file works."""

from __future__ import annotations

import textwrap

import pytest
import torch

from isotile import dispatch, library, registry
from isotile.spec import OpSpec, Scalar, Tensor


def shapes_of(spec: OpSpec, case):
    values = {}
    for name, parameter in spec.signature.parameters.items():
        arg = spec.args[name]
        given = case.args.get(name)
        if isinstance(arg, Tensor):
            dtype = torch.float32 if torch.float32 in arg.dtypes else arg.dtypes[0]
            values[name] = None if given is None else torch.empty(given, dtype=dtype, device="meta")
        else:
            values[name] = given if given is not None else parameter.default
    return values


@pytest.mark.parametrize("op", registry.specs())
def test_every_argument_is_described(op):
    spec = registry.spec(op)
    assert set(spec.args) == set(spec.signature.parameters)
    assert all(isinstance(a, Tensor | Scalar) for a in spec.args.values())
    assert spec.reference.__doc__
    for name in spec.args:
        if not spec.internal and spec.door is None:
            assert f"{name}:" in spec.reference.__doc__ or f"{name}," in spec.reference.__doc__, name


@pytest.mark.parametrize("op", registry.specs())
def test_cases_are_legal_and_counted(op):
    spec = registry.spec(op)
    names = [c.name for c in spec.cases]
    assert len(names) == len(set(names))
    assert any("smoke" in c.tags for c in spec.cases) and any("bench" in c.tags for c in spec.cases)
    for case in spec.cases:
        values = shapes_of(spec, case)
        dispatch.check_types(spec, values)
        dims = dispatch.bind_call(spec, values)
        from types import SimpleNamespace

        assert spec.flops(dims, SimpleNamespace(**values)) > 0


def test_an_operator_is_one_file(tmp_path, monkeypatch):
    """A new spec file is an operator at once: validation, reference, gradient, torch op, vmap, drawn tests."""
    import isotile.ops

    name = "scaled_square_for_test"
    (tmp_path / f"{name}.py").write_text(
        textwrap.dedent(
            f'''
            """A square."""
            from isotile.precision import accumulator, stored
            from isotile.spec import Case, ErrorModel, OpSpec, Result, Scalar, Tensor

            def {name}(x, factor=2.0):
                """factor * x^2.

                Args:
                    x: [...]
                    factor: a number.
                """
                wide = x.to(accumulator(x.dtype))
                return {{"y": stored(factor * wide * wide, x.dtype)}}

            SPEC = OpSpec(
                reference={name},
                args={{"x": Tensor("..."), "factor": Scalar("float", samples=(2.0,))}},
                results={{"y": Result("...", ("x",))}},
                error=ErrorModel(lambda a, t, d: {{"y": (4 * t["y"].abs(), 0.0)}}),
                flops=lambda d, s: 2 * d.rows,
                cases=(Case("tiny", "smoke bench", {{"x": (4, 4)}}),),
            )
            '''
        )
    )
    monkeypatch.setattr(isotile.ops, "__path__", [*isotile.ops.__path__, str(tmp_path)])
    registry.specs.cache_clear()
    try:
        from isotile import doors
        from isotile.testing import check_recipe, recipes

        square = doors.make(name)
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(square(x), 2 * x * x)
        assert torch.autograd.gradcheck(square, (x,))
        torch.testing.assert_close(torch.vmap(square)(x.detach()), 2 * x.detach() ** 2)
        with pytest.raises(TypeError, match=r"x: wanted a torch\.Tensor"):
            square(None)

        import hypothesis

        @hypothesis.settings(max_examples=10)
        @hypothesis.given(recipes(registry.spec(name), torch.bfloat16))
        def agrees(recipe):
            check_recipe(recipe, "reference")

        agrees()
    finally:
        registry.specs.cache_clear()
        library.OPERATORS.pop(name, None)
