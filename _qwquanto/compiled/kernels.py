"""Triton kernels of the compiled decode step: matrix-vector product and flash decoding."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU that Triton knows
    triton = None


if triton:

    @triton.jit
    def gemv_kernel(
        x, weight, scale, y, rows, cols,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        cell = weight + row.to(tl.int64)[:, None] * cols + col[None, :]
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        if EARLY:  # weights are constant: they may be read before the kernel that writes x has ended
            loaded = tl.load(cell, (row < rows)[:, None] & (col < cols)[None, :], 0.0)
        if PDL:
            # in this order: the kernel after this one takes for granted that the one before it has ended
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if EARLY:
            total += loaded.to(tl.float32) * tl.load(x + col, col < cols, 0.0).to(tl.float32)[None, :]
        for first in tl.range(BLOCK if EARLY else 0, cols, BLOCK, num_stages=3):
            inside = (row < rows)[:, None] & (first + col < cols)[None, :]
            values = tl.load(cell + first, inside, 0.0).to(tl.float32)
            total += values * tl.load(x + first + col, first + col < cols, 0.0).to(tl.float32)[None, :]
        factor = tl.load(scale + row, row < rows).to(tl.float32)
        tl.store(y + row, tl.sum(total, 1) * factor, row < rows)

    @triton.jit
    def split_kv(
        query, key, value, mask, out, top, total, group, size, scaling, stride,
        GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        head, block, count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        g, i, place = tl.arange(0, GROUP), tl.arange(0, SIZE), block * BLOCK + tl.arange(0, BLOCK)
        seen = tl.load(mask + place)
        cell = head.to(tl.int64) * stride + place[:, None] * size + i[None, :]
        filled, inside = seen[:, None] & (i < size)[None, :], (g < group)[:, None] & (i < size)[None, :]
        q = tl.load(query + (head * group + g)[:, None] * size + i[None, :], inside, 0.0)
        k, v = tl.load(key + cell, filled, 0.0), tl.load(value + cell, filled, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where(seen[None, :], scores, -1e30)
        highest = tl.max(scores, 1)
        weights = tl.exp(scores - highest[:, None])  # 0 if unseen; `combine` drops all-unseen blocks
        row = (head * count + block) * group + g
        tl.store(top + row, highest, g < group)
        tl.store(total + row, tl.sum(weights, 1), g < group)
        part = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        tl.store(out + row[:, None] * size + i[None, :], part, inside)

    @triton.jit
    def combine(
        part, top, total, out, count, group, size,
        SIZE: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        head, i = tl.program_id(0), tl.arange(0, SIZE)
        highest, weight, y = -1e30, 0.0, tl.zeros((SIZE,), tl.float32)
        for first in tl.range(0, count, BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            row = ((head // group) * count + block) * group + head % group
            tops = tl.load(top + row, block < count, -1e30)
            new = tl.maximum(highest, tl.max(tops, 0))
            old, factor = tl.exp(highest - new), tl.exp(tops - new)
            weight = weight * old + tl.sum(factor * tl.load(total + row, block < count, 0.0), 0)
            inside = (block < count)[:, None] & (i < size)[None, :]
            rows = tl.load(part + row[:, None] * size + i[None, :], inside, 0.0)
            y, highest = y * old + tl.sum(factor[:, None] * rows, 0), new
        tl.store(out + head * size + i, y / weight, i < size)
