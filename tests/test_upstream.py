"""Every test here fails once a defect upstream is mended: the page to read when a pin is raised.

Its docstring names the work-around that can go then. One more needs a Hopper GPU, and stands in test_gpu.py:
test_no_timed_token_plans_attention, for `leave_out_cudnn_attention`.
"""

import inspect

import pytest
import torch
import transformers
from conftest import in_plain_python
from models import trained
from optimum.quanto.library.extensions import extension
from optimum.quanto.tensor.weights.marlin.fp8.qbits import MarlinF8QBytesLinearFunction
from transformers.cache_utils import StaticSlidingWindowLayer

from _qwquanto.compiled.prepare import graphs_compiled


def test_upstream_float8_marlin_still_drops_the_bias():
    """Once this fails, `patch_quanto` may leave "quanto_cuda" alone: Marlin adds the bias (its docstring)."""
    source = inspect.getsource(MarlinF8QBytesLinearFunction.forward)
    assert source.count("bias") == 1, "the bias is used now"


def test_upstream_int2_still_builds_an_extension(monkeypatch):
    """Once this fails, `patch_quanto` may leave `unpack` alone."""

    class Started(Exception):
        pass

    def build(*_, **__):
        raise Started

    monkeypatch.setattr(extension, "load", build)
    registered = extension._extensions["quanto_cpp"]
    monkeypatch.setattr(registered, "_lib", None)
    with pytest.raises(Started):
        torch.ops.quanto.unpack(torch.zeros(4, dtype=torch.uint8), 2)


INT8 = """
    import torch
    torch.manual_seed(0)
    x, scale = torch.randn(5, {columns} + 1).bfloat16(), torch.full((9,), 0.01).bfloat16()
    x = x.flatten()[{start}:][:5 * {columns}].view(5, {columns})
    weight = torch.randint(-127, 128, (9, {columns}), dtype=torch.int8)
    y = torch._weight_int8pack_mm(x, weight, scale).float()
    torch.testing.assert_close(y, x.float() @ (weight.float() * 0.01).t(), rtol=0.05, atol=0.05)
"""


def test_upstream_int8_still_fails_on_odd_shapes_and_addresses():
    """Once this fails, torch is right and `int8_product` may go."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch has a kernel without vector instructions for this processor, which is right")
    assert in_plain_python(INT8.format(columns=64, start=0))[0] == 0
    for columns, start in ((100, 0), (36, 0), (64, 1)):
        assert in_plain_python(INT8.format(columns=columns, start=start))[0] != 0, (columns, start)


def test_upstream_kernels_still_refuse_shapes_and_strides():
    """Once this fails, `patch_quanto` may leave TinyGemm alone, or `int8_product` need not copy."""
    pack, multiply = torch._convert_weight_to_int4pack_for_cpu, torch._weight_int4pack_mm_for_cpu
    with pytest.raises(RuntimeError, match="16"):
        pack(torch.zeros(8, 128, dtype=torch.int32), 2)
    x = torch.ones(128, 3, dtype=torch.bfloat16).t()
    with pytest.raises(RuntimeError, match="contiguous"):
        multiply(
            x, pack(torch.zeros(16, 128, dtype=torch.int32), 2), 128, torch.ones(1, 16, 2, dtype=x.dtype)
        )
    with pytest.raises(RuntimeError, match="contiguous"):
        torch._weight_int8pack_mm(x, torch.zeros(16, 128, dtype=torch.int8), torch.ones(16, dtype=x.dtype))


def test_upstream_float8_still_makes_nan_of_a_row_of_zeros():
    """Once this fails, `patch_quanto` may leave AbsmaxOptimizer alone."""
    code = """
        import torch, optimum.quanto as o
        zeros = torch.zeros(2, 8)
        print(o.quantize_weight(zeros, o.qfloat8, 0, o.AbsmaxOptimizer()(zeros, o.qfloat8, 0)))
    """
    assert "nan" in in_plain_python(code)[1]


def test_upstream_int4_still_takes_tinygemm_whatever_the_shape():
    """Once this fails, `patch_quanto` may leave WeightQBitsTensor.create alone."""
    code = """
        import torch, optimum.quanto as o
        layer = o.QLinear.from_module(torch.nn.Linear(256, 8, dtype=torch.bfloat16), weights=o.qint4)
        layer.freeze()
    """
    code, output = in_plain_python(code)
    assert code != 0 and "16" in output


def test_upstream_still_refuses_to_compile_quanto():
    """Once this fails, `model.hf_quantizer = None` in `prepare_compiled_decode` can go."""
    from transformers.quantizers.quantizer_quanto import QuantoHfQuantizer

    assert QuantoHfQuantizer(transformers.QuantoConfig(weights="int8")).is_compileable is False


def test_upstream_sliding_layers_still_count_in_python():
    """Once this fails, `prepare_compiled_decode` may leave StaticSlidingWindowLayer in the cache."""
    assert "cumulative_length_int" in inspect.getsource(StaticSlidingWindowLayer.update)


def test_upstream_documented_recipe_still_compiles_nothing(tiny):
    """Once this fails, README's section on compiling must change: torch.compile(model).generate compiles."""
    model = trained(tiny, "none")
    before = graphs_compiled()
    torch.compile(model).generate(torch.tensor([[40, 41]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert graphs_compiled() == before
