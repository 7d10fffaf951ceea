"""Attention kernels, forward and backward, through the interpreter against float64."""

import pytest
import torch
from _attention_truth import attention
from _run import close, poisoned, run

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NO_OPTION = {
    "dropout_p": 0.0,
    "is_causal": 0,
    "scale": 0.2,
    "bottom_right": 0,
    "window_left": -1,
    "window_right": -1,
    "softcap": 0.0,
}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": 1},
    "causal bottom right": {"is_causal": 1, "bottom_right": 1},
    "window": {"window_left": 20, "window_right": 9},
    "left window causal": {"window_left": 33, "is_causal": 1, "bottom_right": 1},
    "narrow": {"window_left": 0, "window_right": 0},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": True, "bottom_right": 1},
    "bool mask": {"attn_mask": "bool"},
    "float mask": {"attn_mask": "float", "is_causal": 1},
    "lengths": {"seqlens_k": True, "bottom_right": 1, "is_causal": 1},
    "lengths plain": {"seqlens_k": True},
    "dropout": {"dropout_p": 0.3},
    "zero scale": {"scale": 0.0, "is_causal": 1},
    "negative scale": {"scale": -0.3, "is_causal": 1},
    "everything": {
        "is_causal": 1,
        "bottom_right": 1,
        "window_left": 50,
        "softcap": 3.0,
        "sinks": True,
        "alibi_slopes": True,
        "attn_mask": "float",
        "seqlens_k": True,
        "dropout_p": 0.2,
    },
}
# batch, query heads, key heads, queries, keys, d, dv
SHAPES = {
    "prefill": (2, 4, 2, 100, 130, 24, 40),
    "square": (1, 2, 2, 128, 128, 32, 32),
    "decode": (2, 6, 2, 1, 300, 16, 16),
    "short": (2, 4, 1, 7, 150, 20, 8),
}


def case(shape, option, dtype, layout="plain"):
    b, hq, hk, sq, sk, d, dv = shape
    chosen = {**NO_OPTION, **OPTIONS[option]}
    tensors = {}
    if layout == "plain":
        tensors["query"], tensors["key"], tensors["value"] = (
            torch.randn(b, h, s, w).to(dtype) for h, s, w in ((hq, sq, d), (hk, sk, d), (hk, sk, dv))
        )
    else:
        tensors["query"], tensors["key"], tensors["value"] = (
            torch.randn(b, s, h, 2 * w).to(dtype)[..., ::2].transpose(1, 2)
            for h, s, w in ((hq, sq, d), (hk, sk, d), (hk, sk, dv))
        )
    mask = chosen.pop("attn_mask", None)
    if mask:
        tensors["attn_mask"] = torch.rand(b, 1, sq, sk).expand(b, hq, sq, sk) < 0.6
        if mask == "float":
            tensors["attn_mask"] = torch.randn(b, hq, sq, sk).masked_fill(~tensors["attn_mask"], -float("inf"))
        tensors["attn_mask"][:, :, -1] = False if mask == "bool" else -float("inf")
    if chosen.pop("sinks", False):
        tensors["sinks"] = torch.randn(hq)
    if chosen.pop("alibi_slopes", False):
        tensors["alibi_slopes"] = torch.rand(hq)
    if chosen.pop("seqlens_k", False):
        tensors["seqlens_k"] = torch.tensor([max(sk - 37, 0), 3, sk][:b], dtype=torch.int32)
    if chosen["dropout_p"]:
        tensors["dropout_seed"] = torch.tensor([0x123456789ABCDEF])
    return tensors, chosen


def truth(tensors, scalars, grad_out=None, grad_lse=None):
    floats = {
        name: t.double().requires_grad_()
        for name, t in tensors.items()
        if name in ("query", "key", "value", "sinks") or (name == "attn_mask" and t.dtype != torch.bool)
    }
    named = {**tensors, **floats}
    out, lse = attention(named.pop("query"), named.pop("key"), named.pop("value"), **named, **scalars)
    if grad_out is None:
        return out.detach(), lse.detach()
    live = lse != -float("inf")
    ((out * grad_out.double()).sum() + torch.where(live, lse, 0.0).mul(grad_lse.double()).sum()).backward()
    return (
        out.detach(),
        lse.detach(),
        {name: t.grad if t.grad is not None else torch.zeros_like(t) for name, t in floats.items()},
    )


def forward(tensors, scalars, dtype, config=None):
    b, hq, sq, _ = tensors["query"].shape
    dv = tensors["value"].shape[-1]
    outputs = {"out": poisoned((b, hq, sq, dv), dtype), "lse": poisoned((b, hq, sq))}
    inputs = {
        name: tensors.get(name)
        for name in ("query", "key", "value", "attn_mask", "sinks", "alibi_slopes", "seqlens_k", "dropout_seed")
    }
    run("attention", inputs, outputs, config=config, **scalars)
    return inputs, outputs


# Every option in every shape, each time in another dtype: all three meet every option and every shape. The property
# tests draw the rest; here are the configurations that they do not reach.
PAIRS = [
    pytest.param(FLOATS[(i + j) % 3], shape, option, id=f"{shape}-{option}-{FLOATS[(i + j) % 3]}")
    for i, shape in enumerate(SHAPES)
    for j, option in enumerate(OPTIONS)
]


@pytest.mark.parametrize("dtype,shape,option", PAIRS)
def test_attention_matches_float64(dtype, shape, option):
    tensors, scalars = case(SHAPES[shape], option, dtype, "stepped" if shape == "short" else "plain")
    configs = [None]
    if shape == "decode":
        configs += [{"SPLITS": 3}, {"PACK": False}]
    if shape == "square":
        configs += [{"descriptors": True, "BLOCK_N": 32}]
    out, lse = truth(tensors, scalars)
    for config in configs:
        _, outputs = forward(tensors, scalars, dtype, config)
        close(outputs["lse"], lse, torch.float32, scale=4.0, what=f"lse {config}")
        # probabilities are rounded to the operands' type before the second product
        close(outputs["out"], out, dtype, scale=64.0 * (1 if dtype == torch.float32 else 2**9), what=f"out {config}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_hidden_values_never_reach_the_result(dtype):
    for option in ("causal", "bool mask", "float mask", "lengths", "window"):
        tensors, scalars = case(SHAPES["prefill"], option, dtype)
        clean = forward(tensors, scalars, dtype)[1]
        poison = {**tensors, "key": tensors["key"].clone(), "value": tensors["value"].clone()}
        at = 70
        poison["key"][:, :, at] = float("nan")
        poison["value"][:, :, at] = float("inf")
        poison["value"][:, :, at, 1] = float("nan")
        if option == "bool mask":
            poison["attn_mask"] = tensors["attn_mask"].contiguous()
            poison["attn_mask"][..., at] = False
            clean = forward({**tensors, "attn_mask": poison["attn_mask"]}, scalars, dtype)[1]
        dirty = forward(poison, scalars, dtype)[1]
        sees = truth({**tensors, "value": torch.ones_like(tensors["value"])}, scalars)[0][..., 0] * 0
        b, hq, sq, _ = tensors["query"].shape
        i = torch.arange(sq)
        if option in ("causal", "float mask"):
            hidden = (i < at).expand(b, hq, sq)
        elif option == "window":
            hidden = ((i + 9 < at) | (i - 20 > at)).expand(b, hq, sq)
        elif option == "bool mask":
            hidden = torch.ones(b, hq, sq, dtype=torch.bool)
        else:
            hidden = torch.zeros(b, hq, sq, dtype=torch.bool)
            hidden[1] = True  # length 3
            hidden[0] = i + tensors["seqlens_k"][0] - sq < at
        assert sees.shape == hidden.shape
        assert torch.equal(clean["out"][hidden], dirty["out"][hidden]), option
        assert torch.equal(clean["lse"][hidden], dirty["lse"][hidden]), option


def test_empty_sizes():
    for shape in (
        (2, 2, 1, 0, 5, 8, 8),
        (2, 2, 1, 4, 0, 8, 8),
        (0, 2, 1, 4, 5, 8, 8),
        (1, 2, 1, 4, 5, 0, 8),
        (1, 2, 1, 4, 5, 8, 0),
    ):
        tensors, scalars = case(shape, "sinks", torch.float32)
        out, lse = truth(tensors, scalars)
        outputs = forward(tensors, scalars, torch.float32)[1]
        close(outputs["out"], out, torch.float32)
        close(outputs["lse"], lse, torch.float32, scale=4.0)


@pytest.mark.parametrize("dtype,shape,option", PAIRS)
def test_attention_gradients_match_float64(dtype, shape, option):
    tensors, scalars = case(SHAPES[shape], option, dtype, "stepped" if shape == "short" else "plain")
    q, _k, v = (tensors[name] for name in ("query", "key", "value"))
    grad_out, grad_lse = torch.randn(*q.shape[:-1], v.shape[-1]).to(dtype), torch.randn(q.shape[:-1])
    out, lse, grads = truth(tensors, scalars, grad_out, grad_lse)
    inputs = {
        name: tensors.get(name)
        for name in ("query", "key", "value", "attn_mask", "sinks", "alibi_slopes", "seqlens_k", "dropout_seed")
    }
    outputs = {f"grad_{name}": poisoned(tensors[name].shape, dtype) for name in ("query", "key", "value")}
    outputs["grad_attn_mask"] = poisoned(tensors["attn_mask"].shape) if "attn_mask" in grads else None
    outputs["grad_sinks"] = poisoned(tensors["sinks"].shape) if "sinks" in grads else None
    run(
        "attention_backward",
        {"grad_out": grad_out, "grad_lse": grad_lse, **inputs, "out": out.to(dtype), "lse": lse.float()},
        outputs,
        **scalars,
    )
    # the score's gradient is rounded to the operands' type before its products, and delta takes the rounded result
    unit = 64.0 if dtype == torch.float32 else 2.0**-6 / 2.0**-23 * (1 if dtype == torch.bfloat16 else 0.25) / 16
    for name, grad in grads.items():
        size = grad.abs().max() if grad.numel() else 1.0
        close(outputs[f"grad_{name}"], grad, dtype, scale=unit * (size + 0.05), what=f"grad_{name}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_hidden_values_never_reach_the_gradients(dtype):
    tensors, scalars = case(SHAPES["prefill"], "causal", dtype)
    q, k, v = (tensors[name].clone() for name in ("query", "key", "value"))
    grad_out = torch.randn(*q.shape[:-1], v.shape[-1]).to(dtype)

    def gradients(q, k, v, grad_out):
        forward_inputs = {**tensors, "query": q, "key": k, "value": v}
        inputs, made = forward(forward_inputs, scalars, dtype)
        outputs = {f"grad_{n}": poisoned(t.shape, dtype) for n, t in (("query", q), ("key", k), ("value", v))}
        outputs["grad_attn_mask"] = outputs["grad_sinks"] = None
        run("attention_backward", {"grad_out": grad_out, "grad_lse": None, **inputs, **made}, outputs, **scalars)
        return outputs

    clean = gradients(q, k, v, grad_out)
    # key 70 is hidden from queries before it; query 40 hides from keys after it
    k[:, :, 70], v[:, :, 70] = float("nan"), float("inf")
    dirty = gradients(q, k, v, grad_out)
    assert torch.equal(clean["grad_query"][:, :, :70], dirty["grad_query"][:, :, :70])
    k, v = tensors["key"].clone(), tensors["value"].clone()
    q[:, :, 40], grad_out[:, :, 41] = float("nan"), float("nan")
    dirty = gradients(q, k, v, grad_out)
    for name in ("grad_key", "grad_value"):
        assert torch.equal(clean[name][:, :, 42:], dirty[name][:, :, 42:]), name
        assert dirty[name][:, :, :40].isnan().all(), name
