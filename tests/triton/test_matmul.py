"""matmul kernels through the interpreter against float64, until the property suite covers them."""

import pytest
import torch
import torch.nn.functional as F
from _run import close, poisoned, run

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (lambda z: z, F.relu, F.gelu, lambda z: F.gelu(z, approximate="tanh"), F.silu, F.sigmoid, F.tanh)
CONFIGS = (
    None,
    {"SPLIT_K": 3},
    {"descriptors": True, "SPLIT_K": 1},
    {"descriptors": True, "SPLIT_K": 1, "stored": False, "BLOCK_M": 128, "BLOCK_N": 256},
    {"batch_invariant": True},
)


def operands(dtype, layout, batch, m, n, k, integers=False):
    def draw(*shape):
        return torch.randint(-4, 5, shape).to(dtype) if integers else torch.randn(shape).to(dtype)

    a = draw(*batch, m, k) if layout[0] == "n" else draw(*batch, k, m).transpose(-1, -2)
    b = draw(*batch, k, n) if layout[1] == "n" else draw(*batch, n, k).transpose(-1, -2)
    return a, b


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", ("nn", "nt", "tn", "tt"))
@pytest.mark.parametrize("dtype", FLOATS)
def test_matmul_of_small_integers_is_exact(dtype, layout, config):
    for batch, m, n, k in (((), 70, 150, 136), ((3,), 65, 64, 128), ((), 5, 7, 3)):
        a, b = operands(dtype, layout, batch, m, n, k, integers=True)
        y = poisoned((*batch, m, n))
        run("matmul", {"a": a, "b": b}, {"y": y}, config=config)
        assert torch.equal(y, a.float() @ b.float())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("activation", range(7))
@pytest.mark.parametrize("dtype", FLOATS)
def test_matmul_epilogue_matches_float64(dtype, activation, config):
    m, n, k = 33, 70, 96
    a, b = operands(dtype, "nt", (2,), m, n, k)
    b = b[:1].expand(2, k, n) / 8
    bias, residual = torch.randn(2 * n)[::2], torch.randn(2, n, m).transpose(1, 2)
    y, z = poisoned((2, m, n), dtype), poisoned((2, m, n), dtype)
    run(
        "matmul",
        {"a": a, "b": b, "bias": bias, "residual": residual},
        {"y": y, "preactivation": z},
        config=config,
        activation=activation,
    )
    exact = a.double() @ b.double() + bias.double()
    close(z, exact, dtype, what="preactivation", factor=2)
    close(y, ACTIVATIONS[activation](exact) + residual.double(), dtype, what="y", factor=2, scale=8.0)
    grad = torch.randn(2, m, n).to(dtype)
    grad_z = poisoned((2, n, m), dtype).transpose(1, 2)
    run("matmul_epilogue_backward", {"grad": grad, "preactivation": z}, {"grad_z": grad_z}, activation=activation)
    leaf = z.double().requires_grad_()
    ACTIVATIONS[activation](leaf).backward(grad.double())
    close(grad_z, leaf.grad, dtype, what="grad_z", factor=2, scale=grad.double().abs().max())


def test_empty_inner_dimension_leaves_the_epilogue():
    a, b, bias, y = torch.empty(4, 0), torch.empty(0, 5), torch.randn(5), poisoned((4, 5))
    run("matmul", {"a": a, "b": b, "bias": bias}, {"y": y}, activation=1)
    assert torch.equal(y, bias.relu().expand(4, 5))
    run("matmul", {"a": torch.empty(0, 3), "b": torch.empty(3, 5)}, {"y": torch.empty(0, 5)})


def test_strided_and_broadcast_batches():
    a = torch.randn(2, 3, 1, 9, 20)[..., ::2].expand(2, 3, 4, 9, 10)
    b = torch.randn(2, 1, 4, 11, 10).transpose(-1, -2).expand(2, 3, 4, 10, 11)
    y = poisoned((4, 3, 2, 9, 22)).permute(2, 1, 0, 3, 4)[..., ::2]
    run("matmul", {"a": a, "b": b}, {"y": y})
    close(y, a.double() @ b.double(), torch.float32)


def test_padding_copy_serves_misaligned_operands():
    a, b = torch.randn(65, 71).bfloat16(), torch.randn(71, 67).bfloat16()
    y = poisoned((65, 67), torch.bfloat16)
    run("matmul", {"a": a, "b": b}, {"y": y}, config={"descriptors": True})
    close(y, a.double() @ b.double(), torch.bfloat16)


@pytest.mark.parametrize("layout", ("nn", "tn"))
def test_a_tail_of_k_does_not_read_the_next_matrix(layout):
    a, b = operands(torch.bfloat16, layout, (2,), 64, 64, 72)
    a, b = a.clone(memory_format=torch.preserve_format), b.clone(memory_format=torch.preserve_format)
    a[1], b[1] = float("nan"), float("nan")
    y = poisoned((2, 64, 64))
    run("matmul", {"a": a, "b": b}, {"y": y}, config={"descriptors": True, "SPLIT_K": 1})
    close(y[0], a[0].double() @ b[0].double(), torch.float32)
    assert y[1].isnan().all()
