"""With the configuration "batch_invariant" a row of a batch is bitwise what it is alone; runs repeat bitwise."""

import pytest
import torch
from _run import poisoned, run

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_rows(dtype):
    a, b = torch.randn(150, 200).to(dtype), torch.randn(200, 90).to(dtype)
    whole, alone = poisoned((150, 90)), poisoned((1, 90))
    run("matmul", {"a": a, "b": b}, {"y": whole}, config="batch_invariant")
    # These rows begin tiles: the interpreter multiplies with NumPy, where some libraries round a row by its place.
    for i in (0, 64, 128):
        run("matmul", {"a": a[i : i + 1], "b": b}, {"y": alone}, config="batch_invariant")
        assert torch.equal(whole[i], alone[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_batches(dtype):
    for sq, sk in ((1, 3000), (70, 90)):
        q, k, v = (torch.randn(3, 2, s, 16).to(dtype) for s in (sq, sk, sk))
        options = {"scale": 0.25, "is_causal": 1, "bottom_right": 1}
        whole = {"out": poisoned((3, 2, sq, 16), dtype), "lse": poisoned((3, 2, sq))}
        run("attention", {"query": q, "key": k, "value": v}, whole, config="batch_invariant", **options)
        alone = {"out": poisoned((1, 2, sq, 16), dtype), "lse": poisoned((1, 2, sq))}
        run("attention", {"query": q[1:2], "key": k[1:2], "value": v[1:2]}, alone, config="batch_invariant", **options)
        assert torch.equal(whole["out"][1], alone["out"][0])
        assert torch.equal(whole["lse"][1], alone["lse"][0])


@pytest.mark.parametrize("op", ("rms_norm", "layer_norm", "softmax"))
def test_rows_of_norms_and_softmax(op):
    for n in (100, 6000):
        x = torch.randn(37, n).bfloat16()
        whole, alone = poisoned((37, n)), poisoned((1, n))
        run(op, {"x": x}, {"y": whole}, config="batch_invariant")
        run(op, {"x": x[20:21]}, {"y": alone}, config="batch_invariant")
        assert torch.equal(whole[20], alone[0])


def test_weight_gradients_repeat():
    x, grad = torch.randn(900, 40), torch.randn(900, 40)
    made = []
    for _ in range(2):
        outputs = {"grad_x": poisoned((900, 40)), "grad_weight": poisoned((40,)), "grad_bias": poisoned((40,))}
        run("layer_norm_backward", {"grad": grad, "grad_sum": None, "x": x, "weight": None}, outputs, eps=1e-5)
        made.append(outputs)
    for name, value in made[0].items():
        assert torch.equal(value, made[1][name])
