"""grad_x = y * (grad - sum(grad * y)) over the last dim.

128 rows on partitions; products on Vector, their sum on Scalar. Rows wider than WHOLE are read twice.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from ._arrays import refuse_dtypes, refuse_empty, rows
from ._tiles import DTYPES, add_columns, load, my_tiles

WHOLE = 8192
CHUNK = 2048


@nki.jit
def softmax_backward_kernel(grad, y, x_dtype):
    """grad, y: [rows, n] -> grad_x [rows, n]."""
    total, n = y.shape
    dtype = DTYPES[x_dtype]
    grad_x_hbm = nl.ndarray((total, n), dtype, buffer=nl.shared_hbm)
    width = min(n, CHUNK)
    starts = range(0, n, width)
    first, last = my_tiles(total, 128)
    for r in range(first, last, 128):
        end = min(last, r + 128)
        p = end - r
        partials = nl.ndarray((p, len(starts)), nl.float32, buffer=nl.sbuf)
        held = []
        for i in range(len(starts)):
            c = starts[i]
            stop = min(n, c + width)
            g = load(grad[r:end, c:stop], grad.dtype)
            q = load(y[r:end, c:stop], y.dtype)
            product = nl.ndarray((p, stop - c), nl.float32, buffer=nl.sbuf)
            nisa.tensor_tensor(dst=product, data1=g, data2=q, op=nl.multiply)
            nisa.activation(
                dst=product,
                op=nl.copy,
                data=product,
                reduce_op=nl.add,
                reduce_res=partials[:, i : i + 1],
                reduce_cmd=nisa.reduce_cmd.reset_reduce,
            )
            if n <= WHOLE:
                held.append((g, q))
        dot = add_columns(partials, len(starts))
        for i in range(len(starts)):
            c = starts[i]
            stop = min(n, c + width)
            if n <= WHOLE:
                g, q = held[i]
            else:
                g = load(grad[r:end, c:stop], grad.dtype)
                q = load(y[r:end, c:stop], y.dtype)
            result = nl.ndarray((p, stop - c), dtype, buffer=nl.sbuf)
            nisa.scalar_tensor_tensor(
                dst=result, data=g, op0=nl.subtract, operand0=dot, op1=nl.multiply, operand1=q
            )
            nisa.dma_copy(dst=grad_x_hbm[r:end, c:stop], src=result)
    return grad_x_hbm


def supports(grad, y, **rest):
    return refuse_dtypes({"grad": grad, "y": y}) or refuse_empty({"grad": grad, "y": y})


def run(grad, y, *, outs, cores=1):
    """`outs`: {"grad_x": dtype name}."""
    return {"grad_x": softmax_backward_kernel[cores](rows(grad), rows(y), outs["grad_x"]).reshape(tuple(y.shape))}
