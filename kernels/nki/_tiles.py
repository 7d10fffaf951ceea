"""What several NKI kernels share on the chip. P is the partition dim (128 at most), everything else runs along it."""

import nki.isa as nisa
import nki.language as nl

DTYPES = {"float32": nl.float32, "bfloat16": nl.bfloat16, "float16": nl.float16}
FLOAT32_MIN = -3.4028235e38


def my_tiles(total, size):
    """(first, last) of the items that this core works on, cut at multiples of `size`."""
    tiles = (total + size - 1) // size
    share = (tiles + nl.num_programs(0) - 1) // nl.num_programs(0)
    first = min(total, nl.program_id(0) * share * size)
    return first, min(total, first + share * size)


def load(src, dtype):
    """A new SBUF tile with the content of a 2-D HBM view."""
    tile_sbuf = nl.ndarray(src.shape, dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile_sbuf, src=src)
    return tile_sbuf


def load_across(row_hbm, partitions, start, stop, dtype):
    """[partitions, stop - start]: a piece of an HBM row [1, n], the same on every partition."""
    tile_sbuf = nl.ndarray((partitions, stop - start), dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile_sbuf, src=row_hbm[:, start:stop].broadcast(0, partitions))
    return tile_sbuf


def column(partitions):
    """[P, 1] float32."""
    return nl.ndarray((partitions, 1), nl.float32, buffer=nl.sbuf)


def constant(partitions, columns, value, dtype):
    """Filled on GpSimd, which the kernels leave idle."""
    tile_sbuf = nl.ndarray((partitions, columns), dtype, buffer=nl.sbuf)
    nisa.memset(dst=tile_sbuf, value=value, engine=nisa.engine.gpsimd)
    return tile_sbuf


def add_columns(partials, count):
    """[P, 1] sum of the first `count` columns."""
    if count == 1:
        return partials[:, 0:1]
    total = column(partials.shape[0])
    nisa.tensor_reduce(dst=total, op=nl.add, data=partials[:, 0:count], axis=1)
    return total


def sum_partitions(dst_sbuf, data_sbuf, ones_sbuf):
    """dst [1, n] = sum over the partitions of data [P, n] float32, on the Tensor engine."""
    n = data_sbuf.shape[1]
    for start in range(0, n, 512):
        stop = min(n, start + 512)
        total_psum = nl.ndarray((1, stop - start), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=total_psum, stationary=ones_sbuf, moving=data_sbuf[:, start:stop])
        nisa.tensor_copy(dst=dst_sbuf[:, start:stop], src=total_psum)


def add_other_core(row_sbuf, pipe):
    """With two cores: add the other core's [1, n] partial sums to this core's. Both end with the same total."""
    if nl.num_programs(0) == 2:
        other_sbuf = nl.ndarray(row_sbuf.shape, nl.float32, buffer=nl.sbuf)
        peer = 1 - nl.program_id(0)
        nisa.sendrecv(src=row_sbuf, dst=other_sbuf, send_to_rank=peer, recv_from_rank=peer, pipe_id=pipe)
        if nl.program_id(0) == 0:
            nisa.tensor_tensor(dst=row_sbuf, data1=row_sbuf, data2=other_sbuf, op=nl.add)
        else:
            nisa.tensor_tensor(dst=row_sbuf, data1=other_sbuf, data2=row_sbuf, op=nl.add)
