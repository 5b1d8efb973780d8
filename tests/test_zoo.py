"""Every architecture in every precision against a float32 model that holds Quanto's own numbers."""

import math
import re
import subprocess
import sys
import textwrap

import optimum.quanto
import pytest
import torch
import zoo
from conftest import ROOT
from results import settings
from transformers import AutoConfig, AutoModelForCausalLM

from _qwquanto.compiled.prepare import max_positions
from _qwquanto.worker.loading import load_model, make_meta_model
from _qwquanto.worker.quanto import PATCHED, modules_to_skip, patch_quanto, quanto_defects

PRECISIONS = ("float8", "int8", "int4", "int2")
PROMPT, ANSWER = 10, 12  # tokens


def load(folder, weights):
    """A model as the script loads it."""
    s = settings(device="cpu", model_name=str(folder), weights=weights)
    return load_model(s, str(folder), make_meta_model(s, str(folder)), ["cpu"])


def dequantized(weight):
    """The numbers that a weight of Quanto's stands for, in float32, from its inner tensors."""
    if hasattr(weight, "_scale_shift"):  # TinyGemm: [groups, rows, 2]
        number = weight._data.unpack().float().view(len(weight), len(weight._scale_shift), -1)
        scale, shift = (weight._scale_shift[:, :, i].float().t()[:, :, None] for i in (0, 1))
        return ((number - 8) * scale + shift).flatten(1)
    scale = weight._scale.float()
    if weight._qtype.bits == 8:
        return weight._data.float() * scale
    number, shift = weight._data.unpack().float(), weight._shift
    values = number * scale - shift.float() if shift.is_floating_point() else (number - shift) * scale
    return values.reshape(weight.shape)


def references(folder, quantized):
    """The same model unquantized, with the quantized one's numbers: in float32, and bfloat16 for rounding."""
    models = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for name, module in quantized.named_modules():
            if hasattr(getattr(module, "weight", None), "_qtype"):
                model.get_submodule(name).weight.data.copy_(dequantized(module.weight.data))
        models.append(model)
    return models


@torch.no_grad()
def divergence(exact, model):
    """Mean KL(exact || model) in nats over the model's own greedy answer, decoded token by token."""
    torch.manual_seed(0)
    prompt = torch.randint(3, min(100, model.config.get_text_config().vocab_size), (1, PROMPT))
    options = {"do_sample": False, "min_new_tokens": ANSWER, "max_new_tokens": ANSWER}
    answer = model.generate(prompt, **options, output_logits=True, return_dict_in_generate=True)
    expected = exact(answer.sequences[:, :-1]).logits[0, -ANSWER:].double().log_softmax(-1)
    actual = torch.cat(answer.logits).double().log_softmax(-1)
    return (expected.exp() * (expected - actual)).sum(-1).mean().item()


def compare(folder, weights):
    """Quanto's and mere rounding's distance from the exact answers, quantized layers, what was patched."""
    PATCHED.clear()  # of other models
    quantized = load(folder, weights)
    layers = sum(hasattr(getattr(m, "weight", None), "_qtype") for m in quantized.modules())
    exact, rounded = references(folder, quantized)
    return divergence(exact, quantized), divergence(exact, rounded), layers, quanto_defects(quantized)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products are ten times faster on one thread, and on a busy machine more than that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LONG = [pytest.param(name, marks=pytest.mark.zoo) for name in zoo.ZOO if name not in zoo.SHORT]


@pytest.mark.parametrize("name", [*zoo.SHORT, *LONG])
def test_every_precision_computes_with_its_own_numbers(name, tmp_path):
    zoo.save_model(name, tmp_path)
    for weights in PRECISIONS:
        if name in zoo.NOT_WITH_QUANTO:
            with pytest.raises((RuntimeError, ValueError), match=zoo.NOT_WITH_QUANTO[name]):
                compare(tmp_path, weights)
            continue
        kl, rounding, layers, _ = compare(tmp_path, weights)
        assert layers > 0 or name in zoo.NO_LINEAR, weights
        # Rounding alone moves a token to another expert now and then: no kernel can be closer than that.
        assert kl <= 0.002 + 2 * rounding, (weights, kl, rounding)


def error(layer, x):
    """The largest error of a layer against the product with its own numbers, by the vectors' lengths."""
    weight = dequantized(layer.weight.data)
    with torch.no_grad():
        difference = layer(x).float() - x.float() @ weight.t()
    return (difference.abs() / (x.float().norm(dim=1, keepdim=True) * weight.norm(dim=1))).max().item()


def quantized_linear(rows, columns, kind, dtype=torch.bfloat16):
    patch_quanto()
    layer = torch.nn.Linear(columns, rows, bias=False, dtype=dtype)
    layer = optimum.quanto.QLinear.from_module(layer, weights=getattr(optimum.quanto, kind))
    layer.freeze()
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["qfloat8", "qint8", "qint4", "qint2"])
def test_odd_shapes_are_right_and_so_are_activations_laid_out_oddly(kind, dtype):
    torch.manual_seed(0)
    for columns in (4, 8, 12, 16, 36, 48, 100, 128, 200, 208, 256, 384):
        for rows in (1, 2, 3, 5, 8, 16, 40, 64):
            layer = quantized_linear(rows, columns, kind, dtype)
            for tokens in (1, 3, 5, 17):
                x = torch.randn(tokens, columns).to(dtype)
                shifted = torch.cat([x.flatten(), x[0]])[3 : 3 + x.numel()].view_as(x)  # at an odd address
                for how, given in {
                    "plain": x,
                    "transposed": x.t().contiguous().t(),
                    "shifted": shifted,
                }.items():
                    assert error(layer, given) < 0.01, (columns, rows, tokens, how)


def test_float8_survives_a_row_of_zeros():
    patch_quanto()
    layer = torch.nn.Linear(32, 4, bias=False)
    layer.weight.data[1] = 0
    layer = optimum.quanto.QLinear.from_module(layer, weights=optimum.quanto.qfloat8)
    layer.freeze()
    answer = layer(torch.randn(2, 32))
    assert answer.isfinite().all() and (answer[:, 1] == 0).all()


def in_plain_python(code):
    """(exit code, output) of code in a process of its own, in which nothing is patched."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


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
    code = """
        import torch, optimum.quanto as o
        layer = o.QLinear.from_module(torch.nn.Linear(256, 8, dtype=torch.bfloat16), weights=o.qint4)
        layer.freeze()
    """
    code, output = in_plain_python(code)
    assert code != 0 and "16" in output


def test_routers_that_inherit_from_linear_are_left_alone_and_nothing_else_is(tmp_path):
    skipped = {"llama4_text": "feed_forward.router", "phimoe": "mlp.router", "falcon": None}
    for name, router in skipped.items():
        zoo.save_model(name, tmp_path / name)
        s = settings(device="cpu", model_name=str(tmp_path / name), weights="int8")
        lost = [key for key in modules_to_skip(make_meta_model(s, str(tmp_path / name))) if key.endswith("$")]
        assert len(lost) == (2 if router else 0) and all(re.escape(router) in key for key in lost)
        model = load(tmp_path / name, "int8")
        plain = {
            n
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and not hasattr(m.weight, "_qtype")
        }
        assert {n.split(".", 3)[-1] for n in plain} == ({router, "lm_head"} if router else {"lm_head"}), name
        assert ("subclasses" in quanto_defects(model)) == bool(router)


def test_the_report_hears_what_was_patched(tmp_path):
    patch_quanto()
    zoo.save_model("llama 200", tmp_path / "odd")
    zoo.save_model("llama", tmp_path / "even")
    zoo.save_model("mamba", tmp_path / "transposed")
    told = {(f, w): compare(tmp_path / f, w)[3] for f in ("odd", "even") for w in ("int8", "int4", "float8")}
    assert (
        told["even", "int8"] == told["even", "float8"] == told["odd", "float8"] == told["even", "int4"] == {}
    )
    assert "some layers have no multiple of 16 inputs" in told["odd", "int8"]["int8 shape"]
    assert "compiles a C++ extension" in told["odd", "int4"]["extension"]
    assert "as they lie" in compare(tmp_path / "transposed", "int8")[3]["strides"]


def test_quanto_as_shipped_is_left_as_shipped():
    """In a process of its own: what `patch_quanto` changes cannot be taken back."""
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
                from optimum.quanto.library import qbytes_mm
        mend_quanto(leave_kernels=True)
        print(hasattr(qbytes_mm, "shipped"))
        mend_quanto()
        print(hasattr(qbytes_mm, "shipped"))
    """
    assert in_plain_python(code) == (0, "False\nTrue\n")


def test_the_longest_sequence_whatever_it_is_called():
    limits = {
        "qwen2": 256,
        "mpt": 256,
        "gpt_neox": 256,
        "gptj": 256,
        "mamba": math.inf,
        "bloom": math.inf,
        "xlstm": math.inf,
    }
    assert {name: max_positions(zoo.make_config(name)) for name in limits} == limits
    assert (
        max_positions(AutoConfig.for_model("gemma3"))
        == AutoConfig.for_model("gemma3").text_config.max_position_embeddings
    )
