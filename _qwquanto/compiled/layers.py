"""Quanto's numbers as plain tensors: the linear layers of the compiled step. torch and optimum-quanto."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import optimum.quanto
import torch
from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor
from optimum.quanto.tensor.weights.qbytes import WeightQBytesTensor
from optimum.quanto.tensor.weights.tinygemm.qbits import TinyGemmWeightQBitsTensor
from torch._inductor.custom_graph_pass import CustomGraphPass

from _qwquanto.compiled.kernels import triton
from _qwquanto.compiled.ops import gemv


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers [rows * 8 / bits, columns] of `bits` bits from bytes [rows, columns], as Quanto has them."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer and no more; Llama 4's and PhiMoE's routers inherit from one."""
    if not isinstance(module, torch.nn.Linear):
        return False
    plain = type(module).forward in (torch.nn.Linear.forward, optimum.quanto.QLinear.forward)
    return plain or type(module).__name__ == "FalconLinear"  # x @ weight.T + bias, written out


class DequantLinear(torch.nn.Module):
    """A linear layer whose weight lies in plain tensors; a subclass's product() takes x [tokens, in].

    Layers that are given the same input (q, k and v; gate and up) share one `merged` layer: their tensors,
    which serve the prompt, are then views of its tensors, and its product of one token, of which each takes
    its `part`, is computed once (SharedProducts).
    """

    # tensor to merge -> (its dimension of the outputs, how many outputs one index of that stands for)
    output_axis: dict[str, tuple[int, int]]
    merge_key: Any = None  # what layers must have in common to be merged; None: nothing to gain

    def __init__(self, bias: torch.Tensor | None, **tensors: torch.Tensor) -> None:
        super().__init__()
        self.bias = bias
        self.merged = ()  # in a tuple, it is no submodule
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        if self.merged and len(tokens) == 1:
            y = self.merged[0].product(tokens)[:, self.part]
        else:
            y = self.product(tokens)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class PerChannelLinear(DequantLinear):
    """8 bits, or as stored with a scale of one: data [out, in], scale [out, 1]."""

    output_axis: ClassVar = {"data": (0, 1), "scale": (0, 1)}

    def __init__(self, bias: torch.Tensor | None, data: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(bias, data=data, scale=scale)
        if data.is_cuda:
            native = torch.cuda.get_device_capability(data.device) >= (8, 9)
        else:
            native = torch.backends.cpu.get_cpu_capability() == "AVX512"
        self.emulated = data.dtype == torch.float8_e4m3fn and not native
        self.gemv = data.is_cuda and not self.emulated and triton is not None
        # As Quanto does on a CPU (library/qbytes_mm.py asks for 4), but torch 2.13's kernel crashes or is
        # wrong unless in_features is a multiple of 16: aten/src/ATen/native/cpu/int8mm_kernel.cpp
        self.int8pack = data.is_cpu and data.dtype == torch.int8 and data.shape[1] % 16 == 0
        # for one token, Inductor's sums are a third faster with AVX512, with AVX2 up to seven times slower
        self.reduction_is_faster = native
        if self.gemv or data.is_cpu:
            self.merge_key = data.dtype, scale.dtype, data.shape[1]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        data, scale = self.data, self.scale
        if self.gemv and len(x) == 1:
            return gemv(x.contiguous(), data, scale)
        use_matmul = len(x) > 1 or not torch.compiler.is_compiling()
        if (
            self.int8pack
            and x.dtype == scale.dtype == torch.bfloat16
            and (use_matmul or not self.reduction_is_faster)
        ):
            # a copy: a part of a row may lie at an address that is no multiple of 32: the kernel crashes
            x = x.clone(memory_format=torch.contiguous_format)
            return torch._weight_int8pack_mm(x, data, scale.flatten())
        if use_matmul:
            return x @ (data if data.dtype == x.dtype else data.to(x.dtype) * scale).t()
        # Sums, not a matmul: Inductor fuses them with the reading of the bytes. On a CPU one loop reads a row
        # of each quarter of the matrix, so x is converted once for four; sums of over 4096 numbers are slower
        quarters, chunks, cols = 1, 1, data.shape[1]
        if data.is_cpu:
            quarters = math.gcd(len(data), 4)
            chunks = next((n for n in range(1, 9) if cols % n == 0 and cols // n <= 4096), 1)
        floats = x.float().view(chunks, -1)
        rows = data.view(quarters, -1, chunks, cols // chunks)
        y = torch.stack([(floats * self.to_float(part)).sum(-1) for part in rows]).sum(-1).flatten()
        return (y * scale.float().flatten()).to(x.dtype)[None]

    def to_float(self, data: torch.Tensor) -> torch.Tensor:
        if not self.emulated:
            return data.float()
        # the bits of a float16 of 1/256 of the value, in operations that every machine vectorizes
        half = data.view(torch.int8).to(torch.int16) * 128 & -16512
        return half.view(torch.float16).float() * 256


class GroupwiseLinear(DequantLinear):
    """4 or 2 bits, weight = q * scale + zero a group; data[row, group, i] packs elements i, i + chunk, …"""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        groups, chunk = self.data.shape[1:]
        parts = x.shape[1] // groups // chunk
        bits = 8 // parts
        q = [self.data >> (bits * i) & (2**bits - 1) for i in range(parts)]
        if len(x) > 1 or not torch.compiler.is_compiling():
            weight = torch.stack(q, 2).flatten(2) * self.scale[:, :, None] + self.zero[:, :, None]
            return x @ weight.flatten(1).to(x.dtype).t()
        # The zero is taken out of the sum over a group. The bits stay where they lie in the byte: dividing x
        # by their power of two (exact) takes less than shifting each weight. Four rows a loop, as above
        x = x.reshape(groups, parts, chunk).float()
        shifted = [(x[:, i] * 2.0 ** (-bits * i), (2**bits - 1) << (bits * i)) for i in range(parts)]
        quarters = math.gcd(len(self.data), 4) if self.data.is_cpu else 1
        dots = []
        for data, scale in zip(self.data.chunk(quarters), self.scale.float().chunk(quarters), strict=True):
            dots.append((sum(x * (data & mask) for x, mask in shifted) * scale[:, :, None]).sum((1, 2)))
        y = torch.cat(dots) + (x.sum((1, 2)) * self.zero.float()).sum(-1)
        return y.to(self.scale.dtype)[None]


class TinyGemmLinear(DequantLinear):
    """4 bits in bfloat16, by the kernel that Quanto uses too; its scale is [groups, out, scale and zero]."""

    output_axis: ClassVar = {"data": (0, 8), "scale": (1, 1)}

    def __init__(self, bias: torch.Tensor | None, data: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(bias, data=data, scale=scale)
        self.merge_key = (data.shape[1:], len(scale)) if data.is_cuda else None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        mm = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
        return mm(x.contiguous(), self.data, x.shape[1] // len(self.scale), self.scale.contiguous())


def dequant_linear(linear: torch.nn.Linear) -> DequantLinear:
    """A layer that computes the same with plain tensors, for an unquantized layer or one of Quanto's."""
    weight, bias = getattr(linear.weight, "data", linear.weight), linear.bias
    if not hasattr(weight, "_qtype"):
        return PerChannelLinear(bias, weight, weight.new_ones(len(weight), 1))
    if weight._qtype.bits == 8:
        if type(weight) is not WeightQBytesTensor:  # Marlin's
            weight = weight.weight_qbytes_tensor()
        # a layer of one output has one scale without a dimension
        return PerChannelLinear(bias, weight._data, weight._scale.reshape(-1, 1).expand(len(weight), 1))
    if isinstance(weight, TinyGemmWeightQBitsTensor):
        data = weight._data._data
        if weight.is_cuda:  # packed anew for fewer, larger reads
            q = weight._data.unpack()
            data = torch._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).contiguous(), 8)
        return TinyGemmLinear(bias, data, weight._scale_shift)
    if type(weight) is not WeightQBitsTensor:  # AWQ's
        weight = weight.weight_qbits_tensor()
    bits, rows, packed = weight._qtype.bits, weight.shape[0], weight._data._data
    q = unpack(packed, bits)[: len(weight._data)]  # not PackedTensor's, which compiles a C++ extension
    scale, shift = weight._scale.view(rows, -1), weight._shift.view(rows, -1)
    parts = math.gcd(8 // bits, weight.shape[1] // scale.shape[1])  # as many in a byte as divide a group
    q = q.view(rows, scale.shape[1], parts, -1)
    data = sum(q[:, :, i] << 8 // parts * i for i in range(parts))
    zero = -shift if shift.is_floating_point() else -shift * scale
    return GroupwiseLinear(bias, data=data, scale=scale, zero=zero)


def swap_layers(model: Any) -> None:
    """Give a model the linear layers above. Subclasses of nn.Linear with a forward of their own stay."""
    # names, not modules: a layer that is replaced must not stay in memory
    for name in [name for name, module in model.named_modules() if is_linear(module)]:
        model.set_submodule(name, dequant_linear(model.get_submodule(name)))


def merge_layers(model: Any) -> None:
    """Merge the layers of one parent that are given the very same tensor, as a run of one token shows."""
    given: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
        for name, module in model.named_modules()
        if isinstance(module, DequantLinear) and module.merge_key
    ]
    model(input_ids=torch.ones(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    groups: dict[tuple, list[DequantLinear]] = {}
    for name, tensor in given.items():
        layer = model.get_submodule(name)
        key = name.rpartition(".")[0], id(tensor), type(layer), layer.merge_key
        groups.setdefault(key, []).append(layer)
    for (_, _, kind, _), layers in groups.items():
        if len(layers) == 1:
            continue
        whole = {
            n: torch.cat([getattr(s, n) for s in layers], dim) for n, (dim, _) in kind.output_axis.items()
        }
        merged = kind(None, **whole)
        first = 0
        for layer in layers:
            last = first + layer.scale.shape[kind.output_axis["scale"][0]]
            for n, (dim, unit) in kind.output_axis.items():
                setattr(layer, n, whole[n].narrow(dim, first // unit, (last - first) // unit))
            layer.merged = (merged,)
            layer.part = slice(first, last)
            first = last


class SharedProducts(CustomGraphPass):
    """Inductor pass: a product that several layers ask for (their `merged` one) is computed once."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        aten, ours = torch.ops.aten, torch.ops.qwquanto
        seen = {}
        products = ours.gemv, aten._weight_int4pack_mm, aten._weight_int8pack_mm
        pure = {op.default for op in (*products, aten.view, aten.reshape)}
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in pure:
                first = seen.setdefault((node.target, str(node.args)), node)
                if first is not node:
                    node.replace_all_uses_with(first)
                    graph.erase_node(node)

    def uuid(self) -> str:
        return "qwquanto.SharedProducts 5"  # Inductor's cache on disk goes by it


INDUCTOR_OPTIONS = {
    "combo_kernels": True,
    "post_grad_custom_pre_pass": SharedProducts(),
    "size_asserts": False,  # checks of each call's tensors: on a CPU 20 us a layer
    "alignment_asserts": False,
}
