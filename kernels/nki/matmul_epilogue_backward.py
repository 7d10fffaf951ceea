"""grad_z = grad * activation'(z) from the stored preactivation z; 128 rows on partitions, one load and one store
each.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from ._arrays import refuse_dtypes, refuse_empty, rows
from ._tiles import DTYPES, load, my_tiles

CHUNK = 2048
ROOT_2_PI = 0.7978845608028654  # sqrt(2 / pi)


def _new(like):
    return nl.ndarray(like.shape, nl.float32, buffer=nl.sbuf)


def _slope(z, activation):
    """activation'(z), float32."""
    d = _new(z)
    if activation == 1:
        nisa.tensor_scalar(dst=d, data=z, op0=nl.greater, operand0=0.0)
        # A NaN preactivation is a NaN gradient: add z - z, which is 0 for every finite z.
        bounded = _new(z)
        nisa.tensor_scalar(dst=bounded, data=z, op0=nl.minimum, operand0=1.0, op1=nl.maximum, operand1=-1.0)
        nan = _new(z)
        nisa.tensor_tensor(dst=nan, data1=bounded, data2=bounded, op=nl.subtract)
        nisa.tensor_tensor(dst=d, data1=d, data2=nan, op=nl.add)
    elif activation == 2:
        nisa.activation(dst=d, op=nl.gelu_dx, data=_bounded(z, 30.0))
    elif activation == 3:
        # u = c (z + 0.044715 z^3): d = (1 + t) / 2 + z (1 - t^2) u' / 2 with t = tanh(u), |z| cut at 20
        x = _bounded(z, 20.0)
        square = _new(z)
        nisa.tensor_tensor(dst=square, data1=x, data2=x, op=nl.multiply)
        inner = _new(z)
        nisa.tensor_scalar(
            dst=inner,
            data=square,
            op0=nl.multiply,
            operand0=0.044715 * ROOT_2_PI,
            op1=nl.add,
            operand1=ROOT_2_PI,
        )
        nisa.tensor_tensor(dst=inner, data1=inner, data2=x, op=nl.multiply)
        t = _new(z)
        nisa.activation(dst=t, op=nl.tanh, data=inner)
        slope = _new(z)
        nisa.tensor_scalar(
            dst=slope,
            data=square,
            op0=nl.multiply,
            operand0=1.5 * 0.044715 * ROOT_2_PI,
            op1=nl.add,
            operand1=0.5 * ROOT_2_PI,
        )
        nisa.tensor_tensor(dst=slope, data1=slope, data2=x, op=nl.multiply)
        rest = _new(z)
        nisa.tensor_tensor(dst=rest, data1=t, data2=t, op=nl.multiply)
        nisa.tensor_scalar(dst=rest, data=rest, op0=nl.subtract, operand0=1.0, reverse0=True)
        nisa.tensor_tensor(dst=slope, data1=slope, data2=rest, op=nl.multiply)
        nisa.tensor_scalar(dst=t, data=t, op0=nl.multiply, operand0=0.5, op1=nl.add, operand1=0.5)
        nisa.tensor_tensor(dst=d, data1=t, data2=slope, op=nl.add)
    elif activation == 4:
        nisa.activation(dst=d, op=nl.silu_dx, data=_bounded(z, 200.0))
    else:
        s = _new(z)
        nisa.activation(dst=s, op=nl.sigmoid if activation == 5 else nl.tanh, data=z)
        if activation == 5:
            nisa.tensor_scalar(dst=d, data=s, op0=nl.subtract, operand0=1.0, reverse0=True)
            nisa.tensor_tensor(dst=d, data1=d, data2=s, op=nl.multiply)
        else:
            nisa.tensor_tensor(dst=d, data1=s, data2=s, op=nl.multiply)
            nisa.tensor_scalar(dst=d, data=d, op0=nl.subtract, operand0=1.0, reverse0=True)
    return d


def _bounded(z, limit):
    """z within +-limit, beyond which the derivative is exactly 0 or 1: no 0 * infinity."""
    x = _new(z)
    nisa.tensor_scalar(dst=x, data=z, op0=nl.minimum, operand0=limit, op1=nl.maximum, operand1=-limit)
    return x


@nki.jit
def matmul_epilogue_backward_kernel(grad, z, activation, z_dtype):
    """grad, z: [rows, n] -> grad_z [rows, n]."""
    total, n = z.shape
    dtype = DTYPES[z_dtype]
    grad_z_hbm = nl.ndarray((total, n), dtype, buffer=nl.shared_hbm)
    first, last = my_tiles(total, 128)
    for r in range(first, last, 128):
        end = min(last, r + 128)
        for c in range(0, n, CHUNK):
            stop = min(n, c + CHUNK)
            g = load(grad[r:end, c:stop], grad.dtype)
            result = nl.ndarray((end - r, stop - c), dtype, buffer=nl.sbuf)
            if activation == 0:
                nisa.tensor_copy(dst=result, src=g)
            else:
                d = _slope(load(z[r:end, c:stop], z.dtype), activation)
                nisa.tensor_tensor(dst=result, data1=d, data2=g, op=nl.multiply)
            nisa.dma_copy(dst=grad_z_hbm[r:end, c:stop], src=result)
    return grad_z_hbm


def supports(grad, preactivation, **rest):
    given = {"grad": grad, "preactivation": preactivation}
    return refuse_dtypes(given) or refuse_empty(given)


def run(grad, preactivation, *, activation, outs, cores=1):
    """`outs`: {"grad_z": dtype name}."""
    result = matmul_epilogue_backward_kernel[cores](rows(grad), rows(preactivation), int(activation), outs["grad_z"])
    return {"grad_z": result.reshape(tuple(grad.shape))}
