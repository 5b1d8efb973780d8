"""Patches of Quanto and of torch, and sentences about what they hid. torch and optimum-quanto."""

from __future__ import annotations

import re
import types
from collections import Counter
from typing import Any

import torch
from optimum.quanto.library import qbytes_mm
from optimum.quanto.library.extensions import extension
from optimum.quanto.tensor.optimizers import AbsmaxOptimizer
from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor
from optimum.quanto.tensor.weights.tinygemm.qbits import TinyGemmQBitsLinearFunction
from transformers.quantizers.base import get_keys_to_not_convert

from _qwquanto.compiled.layers import is_linear, unpack

INT4_ROWS = {"cpu": 16, "cuda": 8}  # TinyGemm, the 4-bit kernel, wants a number of rows divisible by this
UPSTREAM_DEFECTS = {  # what was patched -> what Quanto as shipped does; "{}" layers
    "int8 shape": "'s int8 can crash or answer wrongly on a CPU: some layers have no multiple of 16 inputs",
    "strides": "'s kernel stops or crashes: it does not take activations as they lie in this model",
    "int4 shape": "'s int4 cannot be loaded here: its kernel does not take the output size of {} layers",
    "zeros": "'s float8 answers NaN: some layers have a row of zeros",
    "extension": " compiles a C++ extension before the first answer",
    "bias": "'s float8 compiles a CUDA extension, which then leaves out the bias of up to {} layers",
    "subclasses": " makes plain linear layers of {} layers that do more",
}
PATCHED: set[str] = set()  # those of UPSTREAM_DEFECTS that were met so far


def patch_quanto(as_shipped: bool = False) -> None:
    """Keep Quanto from building extensions, losing biases and crashing: optimum-quanto 0.2.7, torch 2.13.0.

    - tensor/weights/marlin/fp8/qbits.py:30: the float8 Marlin kernel never adds its bias; without
      "quanto_cuda" float8 takes quanto::qbytes_mm.
    - library/extensions/extension.py:47: `unpack` (int2; int4 without TinyGemm) compiles for minutes, and a
      stale lock file makes it hang.
    - library/qbytes_mm.py:101 calls torch._weight_int8pack_mm for any in_features % 4 == 0, see int8_product.
    - tensor/weights/qbits.py:119 takes TinyGemm whatever the shape, tensor/weights/tinygemm/qbits.py:53
      whatever the strides; the kernels refuse (aten/src/ATen/native/cuda/int4mm.cu).
    - tensor/optimizers/absmax_optimizer.py:35: a row of zeros gets the scale 0, and float8 then holds 0 / 0.

    A second call changes nothing.
    """
    if as_shipped or hasattr(qbytes_mm, "shipped"):
        return
    for registered in extension._extensions.values():
        registered._lib = types.SimpleNamespace(unpack=unpack)
    extension._extensions.pop("quanto_cuda", None)
    qbytes_mm.shipped = qbytes_mm.qbytes_int8pack_mm
    qbytes_mm.qbytes_int8pack_mm = int8_product  # qbytes_mm_impl_cpu looks the name up when it is called
    create, multiply = WeightQBitsTensor.create, TinyGemmQBitsLinearFunction.forward
    find_scale = AbsmaxOptimizer.optimize

    def create_if_it_fits(qtype, axis, group_size, size, stride, data, scale, shift, requires_grad=False):
        fits = size[0] % INT4_ROWS.get(data.device.type, 1) == 0
        make = create if fits else WeightQBitsTensor
        return make(qtype, axis, group_size, size, stride, data, scale, shift, requires_grad)

    def multiply_contiguous(ctx, x, weight, bias):
        if not x.is_contiguous():
            PATCHED.add("strides")
        return multiply(ctx, x.contiguous(), weight, bias)

    def scale_above_zero(self, base, qtype, axis=None):
        scale = find_scale(self, base, qtype, axis)
        if qtype.is_floating_point and (scale == 0).any():
            PATCHED.add("zeros")
        return scale.masked_fill_(scale == 0, 1)

    WeightQBitsTensor.create = staticmethod(create_if_it_fits)
    TinyGemmQBitsLinearFunction.forward = staticmethod(multiply_contiguous)
    AbsmaxOptimizer.optimize = scale_above_zero


def leave_out_cudnn_attention(as_shipped: bool) -> bool:
    """Keep torch from cuDNN's attention; whether that changed anything.

    On Hopper torch prefers it (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, priority_order), and it
    plans its kernels anew for each shape (cudnn/MHA.cpp, a cache by shape): at each new context length a
    token takes 30 ms more, so that short runs time cuDNN's planning (torch 2.11, H100).
    """
    if as_shipped or not torch.cuda.is_available():
        return False
    shipped = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    return shipped


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x @ (weight * scale).T on a CPU: x [rows, in] in bfloat16, weight [out, in] in int8, scale [out, 1].

    torch._weight_int8pack_mm (aten/src/ATen/native/cpu/int8mm_kernel.cpp) reads 16 columns at a time with no
    remainder, by loads that want multiples of 32 bytes as addresses: elsewhere it crashes or answers garbage.
    """
    if x.shape[-1] % 16:
        PATCHED.add("int8 shape")
        return qbytes_mm.qbytes_mm(x, weight, scale)
    if not x.is_contiguous() or x.data_ptr() % 32:
        PATCHED.add("strides")
        x = x.clone(memory_format=torch.contiguous_format)
    return qbytes_mm.shipped(x, weight, scale)


def linear_subclasses(model: Any) -> list[str]:
    """Names of the layers that inherit from nn.Linear and do more."""
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not is_linear(m)]


def modules_to_skip(model: Any) -> list[str]:
    """What QuantoConfig(modules_to_not_convert=…) must name for right answers; a meta model will do.

    transformers' integrations/quanto.py:91 replaces every subclass of nn.Linear, and what its forward does is
    lost. The list replaces the default one (quantizers/base.py:268), hence its names come first. Names are
    regular expressions, up to 5.17 of any prefix (quantizers/quantizers_utils.py, should_convert_module):
    hence the mark of the end.
    """
    return sorted(get_keys_to_not_convert(model)) + [
        f"{re.escape(name)}$" for name in linear_subclasses(model)
    ]


def quanto_defects(model: Any) -> dict[str, str]:
    """Those of UPSTREAM_DEFECTS that a quantized model met when it ran -> "as shipped, Quanto …".

    The number of layers stands where the model tells it.
    """
    layers = Counter(sorted(PATCHED))  # that these were met, not how often
    layers["subclasses"] = len(linear_subclasses(model))
    for module in linear_layers(model):
        weight = module.weight.data
        rows, columns = module.weight.shape
        if type(weight) is WeightQBitsTensor:
            if (weight._qtype.bits, weight._group_size, weight.dtype) != (4, 128, torch.bfloat16):
                layers["extension"] += 1
            elif rows % INT4_ROWS.get(weight.device.type, 1):
                layers["int4 shape"] += 1
        elif hasattr(weight, "_qtype") and weight._qtype.is_floating_point and weight.is_cuda:
            layers["bias"] += module.bias is not None and rows % 64 == columns % 64 == 0
    return {
        n: f"as shipped, Quanto{UPSTREAM_DEFECTS[n].format(count)}" for n, count in layers.items() if count
    }


def linear_layers(model: Any) -> list[torch.nn.Module]:
    """The linear layers, as Quanto's transformers integration sees them: all but the output embedding."""
    return [m for m in model.modules() if is_linear(m) and m is not model.get_output_embeddings()]
