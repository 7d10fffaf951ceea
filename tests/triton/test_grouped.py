"""Grouped matmul kernels through the interpreter, exactly, with small integers."""

import pytest
import torch
from _run import poisoned, run

OFFSETS = ([10, 10, 75, 130], [0, 0, 0, 0], [140, 140, 140, 140], [1, 2, 3, 139])


def draw(*shape, dtype):
    return torch.randint(-3, 4, shape).to(dtype)


@pytest.mark.parametrize("config", (None, {"descriptors": True}))
@pytest.mark.parametrize("ends", OFFSETS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_grouped_matmul_and_gradients_are_exact(dtype, ends, config):
    total, k, n = 140, 72, 88
    offsets = torch.tensor(ends, dtype=torch.int32)
    a, b = draw(total, k, dtype=dtype), draw(4, k, n, dtype=dtype)
    grad = draw(total, n, dtype=dtype)
    want, want_a, want_b = torch.zeros(total, n), torch.zeros(total, k), torch.zeros(4, k, n)
    start = 0
    for g, end in enumerate(ends):
        want[start:end] = a[start:end].float() @ b[g].float()
        want_a[start:end] = grad[start:end].float() @ b[g].float().T
        want_b[g] = a[start:end].float().T @ grad[start:end].float()
        start = end
    y = poisoned((total, n))
    run("grouped_matmul", {"a": a, "b": b, "offsets": offsets}, {"y": y}, config=config)
    assert torch.equal(y, want)
    outputs = {"grad_a": poisoned((total, k)), "grad_b": poisoned((4, k, n))}
    run("grouped_matmul_backward", {"grad": grad, "a": a, "b": b, "offsets": offsets}, outputs, config=config)
    assert torch.equal(outputs["grad_a"], want_a)
    assert torch.equal(outputs["grad_b"], want_b)
    outputs = {"grad_a": None, "grad_b": poisoned((4, n, k)).transpose(1, 2)}
    run("grouped_matmul_backward", {"grad": grad.float(), "a": a, "b": b, "offsets": offsets}, outputs)
    assert torch.equal(outputs["grad_b"], want_b)


def test_strided_and_empty():
    offsets = torch.tensor([[3, 0], [7, 0]], dtype=torch.int32)[:, 0]
    a, b = draw(5, 9, dtype=torch.float32).T, draw(2, 4, 5, dtype=torch.float32).transpose(1, 2)
    y = poisoned((4, 9)).T
    run("grouped_matmul", {"a": a, "b": b, "offsets": offsets}, {"y": y})
    want = torch.cat([a[:3] @ b[0], a[3:7] @ b[1], torch.zeros(2, 4)])
    assert torch.equal(y, want)
    y = poisoned((9, 4))
    run("grouped_matmul", {"a": a[:, :0], "b": b[:, :0], "offsets": offsets}, {"y": y})
    assert torch.equal(y, torch.zeros(9, 4))
    y = poisoned((9, 4))
    run("grouped_matmul", {"a": a, "b": b[:0], "offsets": offsets[:0]}, {"y": y})
    assert torch.equal(y, torch.zeros(9, 4))
