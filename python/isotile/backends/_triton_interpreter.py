"""Makes Triton's interpreter compute bfloat16 and float8 as the hardware does.

As shipped (3.6 to 3.9) the interpreter stores bfloat16 as uint16 and does integer arithmetic on it, and its float32
to bfloat16 / float8 conversions truncate. Here those tiles are held as float32 arrays of representable values: every
tile is rounded to nearest even when it is made, and memory holds the true bit patterns.

`install()` must run in a process started with TRITON_INTERPRET=1, before the first kernel runs. It touches private
names of Triton, so it refuses versions that it was not tested with and checks itself, loudly.
"""

import numpy as np

_TESTED = ((3, 6), (3, 9))


def _round_bf16(x):
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.uint32(0x7FC00000), rounded).view(np.float32)


def _encode_bf16(x):
    return (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _decode_bf16(raw):
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _float8(name):
    import torch

    dtype = getattr(torch, name)
    limit = torch.finfo(dtype).max
    # every bit pattern decoded once; NaN and infinity included
    table = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()

    def encode(x):
        t = torch.from_numpy(np.array(x, dtype=np.float32))
        t = torch.where(t.isinf() & (name == "float8_e5m2"), t, t.clamp(-limit, limit))  # conversions saturate
        return t.to(dtype).view(torch.uint8).numpy()

    def decode(raw):
        return table[raw]

    return lambda x: decode(encode(x)), encode, decode


def install():
    """Patches the interpreter of this process. Does nothing the second time."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter as interp

    if getattr(interp, "_isotile_shim", False):
        return
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not _TESTED[0] <= version <= _TESTED[1]:
        raise RuntimeError(f"the interpreter shim was tested with triton 3.6 to 3.9, this is {triton.__version__}")
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")

    codecs = {
        tl.bfloat16.name: (np.uint16, _round_bf16, _encode_bf16, _decode_bf16),
        tl.float8e4nv.name: (np.uint8, *_float8("float8_e4m3fn")),
        tl.float8e5.name: (np.uint8, *_float8("float8_e5m2")),
    }
    handle_type, builder = interp.TensorHandle, interp.InterpreterBuilder

    def codec(dtype):
        return codecs.get(dtype.scalar.name)

    # A tile of one of these types is a float32 array; comparisons keep the operand's type on a bool array.
    original_post_init = handle_type.__post_init__

    def post_init(self):
        entry = codec(self.dtype)
        if entry is None:
            original_post_init(self)
        elif self.data.dtype != np.bool_:
            data = self.data
            if data.dtype != np.float32:
                data = np.asarray(data, dtype=np.float32)
            self.data = entry[1](np.ascontiguousarray(data)).reshape(data.shape)

    original_np_dtype, np_dtypes = interp._get_np_dtype, dict.fromkeys(codecs, np.dtype(np.float32))

    def np_dtype(dtype):
        scalar = dtype.scalar
        found = np_dtypes.get(scalar.name)
        if found is None:
            found = np_dtypes[scalar.name] = original_np_dtype(scalar)
        return found

    original_load, original_store = builder.create_masked_load, builder.create_masked_store

    def masked_load(self, ptrs, mask, other, *rest, **named):
        dtype = ptrs.get_element_ty()
        entry = codec(dtype)
        if entry is None:
            return original_load(self, ptrs, mask, other, *rest, **named)
        raw, _, encode, decode = entry
        fill = np.zeros(ptrs.data.shape, raw) if other is None else encode(np.ascontiguousarray(other.data, np.float32))
        return handle_type(decode(interp._interpreter.load(ptrs.data, mask.data, fill, np.dtype(raw))), dtype)

    def masked_store(self, ptrs, value, mask, *rest, **named):
        entry = codec(value.dtype)
        if entry is None:
            return original_store(self, ptrs, value, mask, *rest, **named)
        return interp._interpreter.store(ptrs.data, entry[2](np.ascontiguousarray(value.data, np.float32)), mask.data)

    def cast(self, src, dst_type, *_):
        # float -> low float rounds in post_init, from the value itself, never through a third type
        return handle_type(np.asarray(src.data).astype(np_dtype(dst_type)), dst_type.scalar)

    original_cast, original_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self, src, dst_type):
        lowered = codec(src.dtype) or codec(dst_type)
        return cast(self, src, dst_type) if lowered else original_cast(self, src, dst_type)

    def fp_to_fp(self, src, dst_type, rounding_mode):
        lowered = codec(src.dtype) or codec(dst_type)
        return cast(self, src, dst_type) if lowered else original_fp(self, src, dst_type, rounding_mode)

    def bitcast(self, src, dst_type):
        source, target = codec(src.dtype), codec(dst_type)
        raw = src.data if source is None else source[2](np.ascontiguousarray(src.data, np.float32))
        if target is not None:
            return handle_type(target[3](raw.view(target[0])), dst_type.scalar)
        return handle_type(raw.view(original_np_dtype(dst_type)), dst_type.scalar)

    original_fabs, original_dot = builder.create_fabs, builder.create_dot

    def fabs(self, arg):
        return original_fabs(self, arg) if codec(arg.dtype) is None else handle_type(np.abs(arg.data), arg.dtype.scalar)

    def dot(self, a, b, d, *rest):
        if codec(a.dtype) is None and codec(b.dtype) is None:
            return original_dot(self, a, b, d, *rest)
        product = np.matmul(a.data.astype(np.float32), b.data.astype(np.float32))
        return handle_type(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    handle_type.__post_init__ = post_init
    interp._get_np_dtype = np_dtype
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, fp_to_fp
    builder.create_bitcast, builder.create_fabs, builder.create_dot = bitcast, fabs, dot

    # NumPy 2.4 refuses int() of a one-element array, which 3.6 uses for range(); harmless on later versions.
    original_lang_tensor = interp._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        original_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interp._patch_lang_tensor = patch_lang_tensor
    _patch_once(interp)
    interp._isotile_shim = True
    _check(handle_type, builder, tl)


def _patch_once(interp):
    """Triton patches its language again at each call of a device function, a fifth of the time: once is enough."""
    original_patch, original_run, patched = interp._patch_lang, interp.GridExecutor.__call__, set()

    class Nothing:
        def restore(self):
            pass

    def patch(fn):
        if id(fn.__globals__) in patched:
            return Nothing()
        scope = original_patch(fn)
        patched.add(id(fn.__globals__))
        return scope

    def run(self, *args, **kwargs):
        patched.clear()
        try:
            return original_run(self, *args, **kwargs)
        finally:
            patched.clear()

    interp._patch_lang, interp.GridExecutor.__call__ = patch, run


def _check(handle_type, builder, tl):
    """Rounding at ties, subnormals, infinity and NaN, and one product: wrong here means wrong everywhere."""
    import torch

    x = torch.tensor([1.00390625, 1.01171875, -3.3895314e38, 1e-40, 3.4e38, float("inf"), float("nan"), 1 / 3])
    make = builder()
    for name, dtype in (("bfloat16", tl.bfloat16), ("float8_e5m2", tl.float8e5), ("float8_e4m3fn", tl.float8e4nv)):
        if name != "bfloat16":
            x = x[torch.isfinite(x) & (x.abs() < 400)]
        got = make.cast_impl(handle_type(x.numpy().copy(), tl.float32), dtype).data
        want = x.to(getattr(torch, name)).float().numpy()
        if not np.array_equal(got, want, equal_nan=True):
            raise RuntimeError(f"the interpreter shim rounds {name} wrongly: {got} instead of {want}")
    a, b = (torch.randn(4, 4).bfloat16().float() for _ in "ab")
    zero = handle_type(np.zeros((4, 4), np.float32), tl.float32)
    low = [handle_type(t.numpy().copy(), tl.bfloat16) for t in (a, b)]
    if np.abs(make.create_dot(*low, zero, None, 0).data - (a @ b).numpy()).max() > 1e-5:
        raise RuntimeError("the interpreter shim multiplies bfloat16 wrongly")
