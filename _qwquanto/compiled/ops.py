"""The kernels as torch operators. Imports torch and kernels."""

from __future__ import annotations

from typing import Any

import torch

from _qwquanto.compiled import kernels  # as a module: without Triton it has no kernels
from _qwquanto.compiled.kernels import triton

GEMV_EARLY_BYTES = 12e6  # of a matrix that fits the registers of an H100: it is loaded while the kernel waits


def supports_pdl() -> bool:
    """Whether a kernel can start while the one before it ends: programmatic dependent launch (Hopper on)."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability() >= (9, 0)


def pdl_options() -> dict[str, Any]:
    """For a kernel that calls gdc_wait and gdc_launch_dependents where PDL is set."""
    return {"PDL": True, "launch_pdl": True} if supports_pdl() else {"PDL": False}


@torch.library.custom_op("qwquanto::gemv", mutates_args=())
def gemv(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """y [..., rows] = (weight [rows, columns] x [..., columns]) * scale [rows, 1] for one token on CUDA.

    A decode step's matrix product, which reads each stored byte once and sums in float32. In Triton, since
    Inductor's own reductions come out right only by minutes of tuning, and not every time. Also for
    unquantized weights.
    """
    rows, cols = weight.shape
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    # of 40 forms the fastest on an H100, for matrices of its size
    form = {"ROWS": 2, "BLOCK": 1024, "EARLY": False, "num_warps": 2}
    if weight.nbytes < GEMV_EARLY_BYTES:
        form = {"ROWS": 4, "BLOCK": 2048 if cols > 1024 else 1024, "EARLY": True, "num_warps": 4}
    kernels.gemv_kernel[(triton.cdiv(rows, form["ROWS"]),)](
        x, weight, scale, y, rows, cols, **form, **pdl_options()
    )
    return y


gemv.register_fake(lambda x, weight, *_: x.new_empty(*x.shape[:-1], len(weight)))


@torch.library.custom_op("qwquanto::flash_decode", mutates_args=())
def flash_decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of one token on CUDA.

    query [1, heads, 1, size], key and value [1, kv heads, length, size], mask [1, 1, 1, bucket].
    Flash decoding (Dao and others 2023): each block of 64 places by itself, then all blocks together.
    Inductor's sums read the keys for every head anew and run along the bucket on few processors: 2 and 15 us
    slower a layer at 256 and 2048 places on an H100.
    """
    _, heads, _, size = query.shape
    kv = key.shape[1]
    count, group, wide = mask.shape[-1] // 64, heads // kv, triton.next_power_of_2(size)
    part = query.new_empty(kv, count, group, size, dtype=torch.float32)
    top, total = part.new_empty(kv, count, group), part.new_empty(kv, count, group)
    form = {"GROUP": max(16, triton.next_power_of_2(group)), "SIZE": wide, "BLOCK": 64}
    tensors = (query, key, value, mask, part, top, total)
    kernels.split_kv[(kv, count)](*tensors, group, size, scaling, key.stride(1), **form, **pdl_options())
    out = torch.empty_like(query)
    kernels.combine[(heads,)](part, top, total, out, count, group, size, wide, 16, **pdl_options())
    return out


flash_decode.register_fake(lambda query, *_: torch.empty_like(query))
