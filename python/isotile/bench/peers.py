"""Rivals from other libraries. None is a dependency: each is there if it can be imported, and says so if it cannot.

A method named as an operator takes its arguments by name and returns the rival's call on them, or raises `Unserved`.
What a user of that library does once per model, such as packing a weight or building a session, is done here, outside
of the timing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ..ops._quantized import elements
from ..spec import OpSpec
from .contenders import Call, Compiled, Contender, Torch, Unserved
from .rivals import given


def need(holds: bool, text: str) -> None:
    """Raises `Unserved` where a library does not take an argument."""
    if not holds:
        raise Unserved(text)


class Library(Contender):
    """A rival with a method for each operator that it has.

    Attributes:
        module: what is imported. package: what pip calls it.
        devices: device types that it runs on.
        gradients: whether it is part of autograd.
    """

    module, package = "", ""
    devices: tuple[str, ...] = ("cuda",)
    gradients = False

    @classmethod
    def missing(cls) -> str | None:
        try:
            importlib.import_module(cls.module)
        except ImportError as error:
            return f"{error}; pip install {cls.package}"
        return None

    def bind(self, spec: OpSpec, values: dict[str, Any]) -> Call:
        method: Callable[[dict[str, Any]], Call] | None = getattr(self, spec.name, None)
        if method is None:
            raise Unserved(f"{self.name} has no {spec.name}, or it is not listed in {__name__}")
        tensors = [v for v in values.values() if isinstance(v, torch.Tensor)]
        need(tensors[0].device.type in self.devices, f"{self.name} runs on {', '.join(self.devices)} tensors")
        need(self.gradients or not any(t.requires_grad for t in tensors), f"{self.name} has no gradient")
        return method(values)

    def settings(self) -> dict[str, Any]:
        return {self.package: importlib.metadata.version(self.package)}


def _plain_product(name: str, v: dict[str, Any]) -> None:
    for option in ("residual", "out_dtype"):
        need(v[option] is None, f"{name} is compared without {option}")


def _no_residual(name: str, v: dict[str, Any]) -> None:
    need(v["residual"] is None, f"{name} is compared without residual")


def _last_dim(v: dict[str, Any]) -> tuple[int, ...]:
    shape = tuple(v["normalized_shape"])
    need(len(shape) == 1, "it normalises one dimension")
    return shape


# --- PyTorch's own, chosen by hand ---------------------------------------------------------------------------------


class TorchMath(Torch):
    """Attention by the composite of matrix products and softmax instead of the flash kernel."""

    def bind(self, spec: OpSpec, values: dict[str, Any]) -> Call:
        need(spec.name == "attention", "only attention has a second implementation")
        return super().bind(spec, values)

    @contextlib.contextmanager
    def context(self) -> Any:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "sdpa": "MATH"}


class OneDnn(Library):
    """A linear layer with its weight packed once by oneDNN: what TorchInductor emits for frozen weights."""

    module, package, devices = "torch", "torch", ("cpu",)
    ACTIVATIONS: ClassVar[dict[str | None, tuple[str, list[Any], str]]] = {
        None: ("none", [], ""), "relu": ("relu", [], ""), "sigmoid": ("sigmoid", [], ""), "tanh": ("tanh", [], ""),
        "silu": ("swish", [], ""), "gelu": ("gelu", [], "none"), "gelu_tanh": ("gelu", [], "tanh"),
    }  # fmt: skip

    @classmethod
    def missing(cls) -> str | None:
        return None if torch.backends.mkldnn.is_available() else "PyTorch was built without oneDNN"

    def linear(self, v: dict[str, Any]) -> Call:
        _plain_product(self.name, v)
        x, weight, bias = v["x"], v["weight"], v["bias"]
        need(x.dtype in (torch.float32, torch.bfloat16, torch.float16), f"{self.name} has no {x.dtype}")
        if x.dtype == torch.float16:
            supported = torch.ops.mkldnn._is_mkldnn_fp16_supported()
            need(supported, "oneDNN has no float16 on this processor")
        rows = x.numel() // x.shape[-1]
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return functools.partial(
            torch.ops.mkldnn._linear_pointwise, x, packed, bias, *self.ACTIVATIONS[v["activation"]]
        )

    def matmul(self, v: dict[str, Any]) -> Call:
        need(v["b"].ndim == 2, "the weight of a linear layer has two dimensions")
        return self.linear({**v, "x": v["a"], "weight": v["b"].t().contiguous()})

    def settings(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "weights": "packed once"}


class TorchQuantized(Library):
    """PyTorch's own kernels on packed weights: int8 and int4 with bfloat16 activations, int8 by int8 from float32."""

    module, package, devices = "torch", "torch", ("cpu",)

    def quantized_linear(self, v: dict[str, Any]) -> Call:
        _plain_product(self.name, v)
        need(v["bias"] is None and v["activation"] is None, "it is compared without an epilogue")
        need(v["x"].ndim == 2, "it wants two dimensions")
        method = {"int8": self._int8, "int4": self._int4, "int8_dynamic": self._int8_dynamic}.get(v["scheme"])
        if method is None:
            raise Unserved(f"PyTorch has no kernel of {v['scheme']}")
        return method(v)

    def _int8(self, v: dict[str, Any]) -> Call:
        need(v["x"].dtype == torch.bfloat16 and v["group_size"] == -1, "its activations are bfloat16, one scale a row")
        scales = v["scales"][:, 0].bfloat16().contiguous()
        return functools.partial(torch.ops.aten._weight_int8pack_mm, v["x"], v["packed"].view(torch.int8), scales)

    def _int4(self, v: dict[str, Any]) -> Call:
        need(v["x"].dtype == torch.bfloat16, "its activations are bfloat16")
        need(v["zeros"] is None and v["group_size"] in (32, 64, 128), "it is compared symmetric, in groups")
        codes = elements(v["packed"], "int4", v["x"].shape[-1], torch.float32).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = v["scales"].bfloat16().t()
        both = torch.stack((scales, torch.zeros_like(scales)), dim=2).contiguous()
        return functools.partial(torch.ops.aten._weight_int4pack_mm_for_cpu, v["x"], packed, v["group_size"], both)

    def _int8_dynamic(self, v: dict[str, Any]) -> Call:
        need(v["x"].dtype == torch.float32 and v["group_size"] == -1, "its activations are float32, one scale a row")
        scales = v["scales"][:, :1].double()  # it wants positive ones: the sign goes into the weight
        signed = v["packed"].view(torch.int8).int() * scales.sign().int()
        weight8, scales = signed.clamp(-128, 127).to(torch.int8), scales[:, 0].abs()
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(weight8, scales, zeros, 0)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        return functools.partial(torch.ops.quantized.linear_dynamic, v["x"], packed, False)

    def settings(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "engine": torch.backends.quantized.engine, "weights": "packed once"}


# --- ONNX Runtime --------------------------------------------------------------------------------------------------


class OnnxRuntime(Library):
    """Models of one node on the CPU provider, weights as initialisers, so that it packs them."""

    module, package, devices = "onnxruntime", "onnxruntime", ("cpu",)
    #: The largest number of threads of the run: one pool for all sessions, since each keeps its own busy for a while.
    most_threads = 1
    #: Its threads go on spinning after a call; the next contender's sample waits for that to end.
    settle_s = 0.02
    _pool: int | None = None

    @classmethod
    def missing(cls) -> str | None:
        for module in ("onnx", "onnxruntime"):
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"{error}; pip install onnx onnxruntime"
        return None

    def _run(
        self, node: tuple[Any, ...], inputs: dict[str, torch.Tensor], constants: dict[str, torch.Tensor], **more: Any
    ) -> tuple[Any, dict[str, Any]]:
        """(session, its inputs as numpy arrays) of a model of one node `(operator, input names, output names)`."""
        import onnx
        import onnxruntime

        kinds = {torch.float32: onnx.TensorProto.FLOAT, torch.int32: onnx.TensorProto.INT32}
        kind, names, outputs = node
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(kind, names, outputs, **more)],
            "one",
            [onnx.helper.make_tensor_value_info(n, kinds[t.dtype], list(t.shape)) for n, t in inputs.items()],
            [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outputs],
            [onnx.numpy_helper.from_array(t.numpy(), n) for n, t in constants.items()],
        )
        opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        threads = torch.get_num_threads()
        if OnnxRuntime._pool is None and threads > 1:
            OnnxRuntime._pool = max(threads, self.most_threads)
            onnxruntime.set_global_thread_pool_sizes(OnnxRuntime._pool, 1)
        options.use_per_session_threads = threads != OnnxRuntime._pool
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session, {n: t.numpy() for n, t in inputs.items()}

    def _first(self, session: Any, feed: dict[str, Any]) -> Call:
        name = [session.get_outputs()[0].name]
        return lambda: torch.from_numpy(session.run(name, feed)[0])

    def _float32(self, *tensors: torch.Tensor | None) -> None:
        need(all(t is None or t.dtype == torch.float32 for t in tensors), "its CPU kernels are float32")

    def linear(self, v: dict[str, Any]) -> Call:
        _plain_product(self.name, v)
        need(v["bias"] is None and v["activation"] is None, "it is compared without an epilogue")
        self._float32(v["x"], v["weight"])
        weight = v["weight"].t().contiguous()
        return self._first(*self._run(("MatMul", ["x", "w"], ["y"]), {"x": v["x"]}, {"w": weight}))

    def matmul(self, v: dict[str, Any]) -> Call:
        need(v["b"].ndim == 2, "the weight of a linear layer has two dimensions")
        return self.linear({**v, "x": v["a"], "weight": v["b"].t()})

    def layer_norm(self, v: dict[str, Any]) -> Call:
        _no_residual(self.name, v)
        _last_dim(v)
        need(v["weight"] is not None and v["bias"] is not None, "it wants a weight and a bias")
        self._float32(v["x"], v["weight"], v["bias"])
        constants = {"w": v["weight"], "b": v["bias"]}
        node = ("LayerNormalization", ["x", "w", "b"], ["y"])
        return self._first(*self._run(node, {"x": v["x"]}, constants, axis=-1, epsilon=v["eps"]))

    def rms_norm(self, v: dict[str, Any]) -> Call:
        _no_residual(self.name, v)
        _last_dim(v)
        need(v["weight"] is not None, "it wants a weight")
        self._float32(v["x"], v["weight"])
        eps = torch.finfo(torch.float32).eps if v["eps"] is None else v["eps"]
        weight = v["weight"] + v["weight_offset"]
        node = ("SimplifiedLayerNormalization", ["x", "w"], ["y"])
        return self._first(*self._run(node, {"x": v["x"]}, {"w": weight}, axis=-1, epsilon=eps))

    def softmax(self, v: dict[str, Any]) -> Call:
        need(v["dtype"] is None, "it is compared without dtype")
        self._float32(v["x"])
        return self._first(*self._run(("Softmax", ["x"], ["y"]), {"x": v["x"]}, {}, axis=v["dim"]))

    def quantized_linear(self, v: dict[str, Any]) -> Call:
        """DynamicQuantizeMatMul (one scale for all activations) or MatMulNBits with int8 activations."""
        _plain_product(self.name, v)
        need(v["bias"] is None and v["activation"] is None, "it is compared without an epilogue")
        self._float32(v["x"])
        k, domain = v["x"].shape[-1], "com.microsoft"
        if v["scheme"] == "int8_dynamic" and v["group_size"] == -1:
            constants = {
                "w": v["packed"].view(torch.int8).t().contiguous(),
                "s": v["scales"][:, 0].float(),
                "z": torch.zeros(len(v["scales"]), dtype=torch.int8),
            }
            node = ("DynamicQuantizeMatMul", ["x", "w", "s", "z"], ["y"])
            return self._first(*self._run(node, {"x": v["x"]}, constants, domain=domain))
        need(v["scheme"] == "int4_dynamic" and v["group_size"] > 0 and v["zeros"] is None, "it has no such format")
        group = v["group_size"]
        need(k % group == 0, "it wants whole groups")
        codes = elements(v["packed"], "int4", k, torch.float32).to(torch.uint8).view(-1, k // group, group)
        constants = {"w": codes[..., ::2] | (codes[..., 1::2] << 4), "s": v["scales"].float().flatten()}
        node = ("MatMulNBits", ["x", "w", "s"], ["y"])
        more = {"K": k, "N": len(codes), "bits": 4, "block_size": group, "accuracy_level": 4, "domain": domain}
        return self._first(*self._run(node, {"x": v["x"]}, constants, **more))

    def attention(self, v: dict[str, Any]) -> Call:
        """MultiHeadAttention, or GroupQueryAttention for grouped or decoded heads: they keep heads beside the width."""
        query, key, value = v["query"], v["key"], v["value"]
        self._float32(query, key, value)
        _plain_attention(self.name, v)
        need(query.ndim == 4 and key.shape == value.shape, "it wants [batch, heads, tokens, head_dim]")
        batch, heads, queries, _ = query.shape
        kv_heads, keys = key.shape[1:3]
        q, k, val = (t.transpose(1, 2).flatten(2).contiguous() for t in (query, key, value))
        scale = {} if v["scale"] is None else {"scale": v["scale"]}
        if heads == kv_heads and queries == keys:
            causal = int(v["is_causal"])
            node = ("MultiHeadAttention", ["q", "k", "v"], ["y"])
            more = {"num_heads": heads, "unidirectional": causal, "domain": "com.microsoft", **scale}
            call = self._first(*self._run(node, {"q": q, "k": k, "v": val}, {}, **more))
            return lambda: call().unflatten(2, (heads, -1)).transpose(1, 2)
        more = {"num_heads": heads, "kv_num_heads": kv_heads, "domain": "com.microsoft", **scale}
        if queries == keys:
            need(v["is_causal"], "its GroupQueryAttention is causal")
            lengths = {"sl": torch.full((batch,), keys - 1, dtype=torch.int32), "tl": torch.tensor(keys).int()}
            node = ("GroupQueryAttention", ["q", "k", "v", "", "", "sl", "tl"], ["y", "pk", "pv"])
            call = self._first(*self._run(node, {"q": q, "k": k, "v": val, **lengths}, {}, **more))
            return lambda: call().unflatten(2, (heads, -1)).transpose(1, 2)
        need(queries == 1 and batch == 1 and not v["is_causal"], "its decode is of one query and one sequence")
        return self._decode(q, k, val, key, value, more)

    def _decode(self, q: Any, k: Any, val: Any, key: torch.Tensor, value: torch.Tensor, more: dict[str, Any]) -> Call:
        """The last key is new, the others lie in a buffer shared with the result, as its generation loop has it."""
        import onnxruntime

        keys = key.shape[2]
        inputs = {
            "q": q, "k": k[:, -1:].contiguous(), "v": val[:, -1:].contiguous(), "pk": key.contiguous().clone(),
            "pv": value.contiguous().clone(), "sl": torch.full((1,), keys - 1, dtype=torch.int32),
            "tl": torch.tensor(keys).int(),
        }  # fmt: skip
        node = ("GroupQueryAttention", ["q", "k", "v", "pk", "pv", "sl", "tl"], ["y", "nk", "nv"])
        session, feed = self._run(node, inputs, {}, **more)
        held = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a) for n, a in feed.items()}
        binding = session.io_binding()
        for name, buffer in held.items():
            binding.bind_ortvalue_input(name, buffer)
        binding.bind_output("y")
        binding.bind_ortvalue_output("nk", held["pk"])
        binding.bind_ortvalue_output("nv", held["pv"])
        heads = more["num_heads"]

        def call() -> torch.Tensor:
            session.run_with_iobinding(binding)
            out = torch.from_numpy(binding.get_outputs()[0].numpy())
            return out.unflatten(2, (heads, -1)).transpose(1, 2)

        return call

    def settings(self) -> dict[str, Any]:
        import onnx

        return {**super().settings(), "onnx": onnx.__version__, "provider": "CPUExecutionProvider"}


# --- zentorch ------------------------------------------------------------------------------------------------------


class ZenTorch(Library):
    """AMD's ZenDNN through the operators that zentorch's compiler passes put in, weights packed as those passes do.

    Its import adds operators, their lowerings and a backend of torch.compile; it replaces no operator, lowering,
    decomposition or fusion pattern of PyTorch (2.13.0.2), so that the other rivals stay what they are.

    Its quantised products are not here: a weight is laid out in the first call and the layout kept by address, so that
    samples over several weights would time it, and its own packing of int8 gives a wrong product for 4096 x 4096.
    """

    module, package, devices = "zentorch", "zentorch", ("cpu",)

    @classmethod
    def missing(cls) -> str | None:
        try:
            reason = super().missing()
        except OSError as error:  # its library is loaded by hand
            return f"{error}; pip install {cls.package}"
        if reason is None and getattr(sys.modules[cls.module], "__stable_abi_only__", False):
            return f"it was built for another PyTorch than {torch.__version__} and has only some of its operators here"
        return reason

    def bind(self, spec: OpSpec, values: dict[str, Any]) -> Call:
        if any(isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16 for v in values.values()):
            need(torch.ops.zentorch.zentorch_is_bf16_supported(), "it has no bfloat16 on this processor")
        return super().bind(spec, values)

    def linear(self, v: dict[str, Any]) -> Call:
        _plain_product(self.name, v)
        need(v["activation"] is None, "it is compared without an activation")
        need(v["x"].dtype in (torch.float32, torch.bfloat16), f"{self.name} has no {v['x'].dtype} on every processor")
        packed = torch.ops.zentorch.zentorch_weight_prepack_for_linear(v["weight"].contiguous().clone())
        operator = torch.ops.zentorch.zentorch_linear_unary
        return functools.partial(operator, v["x"], packed, v["bias"], is_weight_prepacked=True)

    def matmul(self, v: dict[str, Any]) -> Call:
        need(v["b"].ndim == 2, "the weight of a linear layer has two dimensions")
        return self.linear({**v, "x": v["a"], "weight": v["b"].t()})

    def rms_norm(self, v: dict[str, Any]) -> Call:
        _no_residual(self.name, v)
        _last_dim(v)
        need(v["weight"] is not None, "it wants a weight")
        need(v["x"].dtype == v["weight"].dtype and v["x"].dtype != torch.float16, "it has float32 and bfloat16")
        eps = torch.finfo(v["x"].dtype).eps if v["eps"] is None else v["eps"]
        return functools.partial(torch.ops.zentorch.zentorch_rms_norm, v["x"], v["weight"] + v["weight_offset"], eps)

    def attention(self, v: dict[str, Any]) -> Call:
        _plain_attention(self.name, v)
        query, key, value = v["query"], v["key"], v["value"]
        need(query.ndim == 4 and key.shape == value.shape, "it wants [batch, heads, tokens, head_dim]")
        need(query.dtype != torch.float16, f"{self.name} has no float16 on every processor")
        operator = torch.ops.zentorch.zentorch_sdpa
        return lambda: operator(query, key, value, 0.0, v["is_causal"], scale=v["scale"])[0]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "weights": "packed once"}


def _plain_attention(name: str, v: dict[str, Any], also: tuple[str, ...] = ()) -> None:
    beyond = ("attn_mask", "softcap", "sinks", "alibi_slopes", "seqlens_k", "window_left", "window_right", "dropout_p")
    extra = [n for n in beyond if n not in also and given(v, n)]
    need(not extra, f"{name} is compared without {', '.join(extra)}")
    square = v["query"].shape[-2] == v["key"].shape[-2]
    need(not v["is_causal"] or square, f"{name} is compared causally where there are as many queries as keys")


# --- GPU libraries -------------------------------------------------------------------------------------------------


class Liger(Library):
    """Liger-Kernel's functional forms, which keep their inputs."""

    module, package, gradients = "liger_kernel.transformers.functional", "liger-kernel", True

    def layer_norm(self, v: dict[str, Any]) -> Call:
        _no_residual(self.name, v)
        _last_dim(v)
        need(v["weight"] is not None and v["bias"] is not None, "it wants a weight and a bias")
        from liger_kernel.transformers.functional import liger_layer_norm

        return functools.partial(liger_layer_norm, v["x"], v["weight"], v["bias"], v["eps"])

    def rms_norm(self, v: dict[str, Any]) -> Call:
        _last_dim(v)
        need(v["weight"] is not None, "it wants a weight")
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_rms_norm

        eps = torch.finfo(v["x"].dtype).eps if v["eps"] is None else v["eps"]
        rest = (v["weight"], eps, v["weight_offset"], "gemma" if v["weight_offset"] else "llama", False)
        if v["residual"] is not None:
            return functools.partial(liger_fused_add_rms_norm, v["x"], v["residual"], *rest)
        return functools.partial(liger_rms_norm, v["x"], *rest)

    def softmax(self, v: dict[str, Any]) -> Call:
        need(v["dim"] in (-1, v["x"].ndim - 1) and v["dtype"] is None, "its softmax is along the last dimension")
        from liger_kernel.transformers.functional import liger_softmax

        return functools.partial(liger_softmax, v["x"])


class FlashAttention(Library):
    """flash-attn 2, on views: it keeps heads after tokens."""

    module, package, gradients = "flash_attn", "flash-attn", True

    def attention(self, v: dict[str, Any]) -> Call:
        query, key, value = v["query"], v["key"], v["value"]
        need(query.dtype in (torch.bfloat16, torch.float16), f"{self.name} has no {query.dtype}")
        _plain_attention(self.name, v, also=("softcap", "alibi_slopes", "window_left", "window_right"))
        need(query.ndim == 4, "it wants [batch, heads, tokens, head_dim]")
        from flash_attn import flash_attn_func

        window = tuple(-1 if v[n] is None else v[n] for n in ("window_left", "window_right"))
        q, k, val = (t.transpose(1, 2) for t in (query, key, value))

        def call() -> torch.Tensor:
            return flash_attn_func(
                q, k, val, softmax_scale=v["scale"], causal=v["is_causal"], window_size=window,
                softcap=v["softcap"] or 0.0, alibi_slopes=v["alibi_slopes"],
            ).transpose(1, 2)  # fmt: skip

        return call


class Quack(Library):
    """Quack's CuTe kernels for Hopper and Blackwell."""

    module, package, gradients = "quack", "quack-kernels", True

    def rms_norm(self, v: dict[str, Any]) -> Call:
        _last_dim(v)
        need(not v["weight_offset"], f"{self.name} is compared without weight_offset")
        from quack import rmsnorm

        eps = torch.finfo(v["x"].dtype).eps if v["eps"] is None else v["eps"]
        return functools.partial(rmsnorm, v["x"], v["weight"], residual=v["residual"], eps=eps)

    def softmax(self, v: dict[str, Any]) -> Call:
        x = v["x"]
        need(x.ndim == 2 and v["dim"] in (-1, 1) and v["dtype"] is None, "its softmax is of rows")
        from quack import softmax

        return functools.partial(softmax, x)

    def matmul(self, v: dict[str, Any]) -> Call:
        _plain_product(self.name, v)
        need(v["activation"] is None and v["bias"] is None, "it is compared without an epilogue")
        need(v["a"].ndim == 2 and v["b"].ndim == 2, "it wants two matrices")
        need(v["a"].dtype in (torch.bfloat16, torch.float16), f"{self.name} is compared in 16-bit types")
        from quack.gemm_interface import gemm

        return functools.partial(gemm, v["a"], v["b"])

    def linear(self, v: dict[str, Any]) -> Call:
        need(v["bias"] is None, "it is compared without an epilogue")
        return self.matmul({**v, "a": v["x"].flatten(0, -2), "b": v["weight"].t()})


class TorchAo(Library):
    """torchao's `quantize_`, which chooses the scales again from the weight that ours stand for."""

    module, package, devices = "torchao.quantization", "torchao", ("cpu", "cuda")

    def quantized_linear(self, v: dict[str, Any]) -> Call:
        _plain_product(self.name, v)
        need(v["bias"] is None and v["activation"] is None, "it is compared without an epilogue")
        need(v["scheme"] in ("int8", "int8_dynamic") and v["group_size"] == -1, f"{v['scheme']} is not listed for it")
        from torchao import quantization

        k = v["x"].shape[-1]
        weight = elements(v["packed"], "int8", k, torch.float32) * v["scales"].float()
        layer = torch.nn.Linear(k, len(weight), bias=False, dtype=v["x"].dtype, device=weight.device)
        layer.weight = torch.nn.Parameter(weight.to(v["x"].dtype), requires_grad=False)
        kind = "Int8WeightOnlyConfig" if v["scheme"] == "int8" else "Int8DynamicActivationInt8WeightConfig"
        model = torch.nn.Sequential(layer)
        quantization.quantize_(model, getattr(quantization, kind)())
        return functools.partial(model, v["x"])


class GemLite(Library):
    """GemLite's Triton kernels, with our packed numbers and scales."""

    module, package = "gemlite.helper", "gemlite"

    def quantized_linear(self, v: dict[str, Any]) -> Call:
        _plain_product(self.name, v)
        need(v["activation"] is None, "it is compared without an activation")
        need(v["x"].dtype in (torch.bfloat16, torch.float16), f"{self.name} has no {v['x'].dtype}")
        from gemlite import helper

        x, dtype, device = v["x"], v["x"].dtype, str(v["x"].device)
        if v["scheme"] in ("int8", "int8_dynamic") and v["group_size"] == -1:
            kind = helper.A16W8_INT8 if v["scheme"] == "int8" else helper.A8W8_int8_dynamic
            layer = kind(device=device, dtype=dtype).from_weights(v["packed"].view(torch.int8), v["bias"], v["scales"])
        else:
            need(v["scheme"] == "int4" and v["zeros"] is None and v["group_size"] > 0, f"{v['scheme']} is not listed")
            codes = elements(v["packed"], "int4", x.shape[-1], torch.float32).to(torch.uint8)
            zeros = torch.full_like(v["scales"], 8.0)
            layer = helper.A16W4_HQQ_INT(device=device, dtype=dtype).from_weights(codes, v["scales"], zeros, v["bias"])
        return functools.partial(layer, x)


RIVALS: dict[str, type[Contender]] = {
    "torch": Torch,
    "compile": Compiled,
    "torch-math": TorchMath,
    "torch-quantized": TorchQuantized,
    "onednn": OneDnn,
    "onnxruntime": OnnxRuntime,
    "zentorch": ZenTorch,
    "liger": Liger,
    "flash-attn": FlashAttention,
    "quack": Quack,
    "torchao": TorchAo,
    "gemlite": GemLite,
}
