"""Every architecture against a float32 model that holds Quanto's own numbers; what is patched, and told."""

import itertools
import re

import optimum.quanto
import pytest
import torch
import zoo
from conftest import ROOT, in_plain_python
from models import load
from optimum.quanto.library.extensions import extension
from results import settings
from transformers import AutoModelForCausalLM
from zoo import dequantized

from _qwquanto.worker.loading import make_meta_model
from _qwquanto.worker.quanto import PATCHED, modules_to_skip, patch_quanto, quanto_defects


def test_no_extension_is_ever_built_and_unpack_is_quantos(monkeypatch):
    def build(*_, **__):
        raise AssertionError("a compiler was started")

    monkeypatch.setattr(extension, "load", build)
    patch_quanto()
    packed = torch.randint(0, 256, (16, 8), dtype=torch.uint8)
    for bits in (2, 4):
        parts = [(packed // 2**shift) % 2**bits for shift in range(0, 8, bits)]
        assert torch.equal(torch.ops.quanto.unpack(packed, bits), torch.cat(parts))


PRECISIONS = ("float8", "int8", "int4", "int2")
PROMPT, ANSWER = 10, 12  # tokens


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


def check_own_numbers(name, folder, precisions):
    """A model of the zoo answers as its own numbers do, but for rounding."""
    zoo.save_model(name, folder)
    for weights in precisions:
        if name in zoo.NOT_WITH_QUANTO:
            with pytest.raises((RuntimeError, ValueError), match=zoo.NOT_WITH_QUANTO[name]):
                compare(folder, weights)
            continue
        kl, rounding, layers, _ = compare(folder, weights)
        assert layers > 0 or name in zoo.NO_LINEAR, weights
        # Rounding alone moves a token to another expert now and then: no kernel can be closer than that.
        assert kl <= 0.002 + 2 * rounding, (weights, kl, rounding)


@pytest.mark.parametrize("name", zoo.SHORT)
def test_int8_and_int4_compute_with_their_own_numbers(name, tmp_path):
    """Their kernels are those that refuse shapes; float8 and int2 are plain products whatever the model."""
    check_own_numbers(name, tmp_path, ("int8", "int4"))


@pytest.mark.zoo
@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_precision_computes_with_its_own_numbers(name, tmp_path):
    check_own_numbers(name, tmp_path, PRECISIONS)


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


def check_products(kind, dtype, every_columns, every_rows, every_tokens):
    torch.manual_seed(0)
    for columns, rows in itertools.product(every_columns, every_rows):
        layer = quantized_linear(rows, columns, kind, dtype)
        for tokens in every_tokens:
            x = torch.randn(tokens, columns).to(dtype)
            shifted = torch.cat([x.flatten(), x[0]])[3 : 3 + x.numel()].view_as(x)  # at an odd address
            transposed = x.t().contiguous().t()
            for how, given in {"plain": x, "transposed": transposed, "shifted": shifted}.items():
                assert error(layer, given) < 0.01, (columns, rows, tokens, how)


@pytest.mark.parametrize("kind", ["qfloat8", "qint8", "qint4", "qint2"])
def test_odd_shapes_are_right_and_so_are_activations_laid_out_oddly(kind):
    """In bfloat16, which kernels are for. Columns: 36 and 100 are no multiple of 16, 48 is none of 32, 128 a
    group, 384 three. Rows: 16 are TinyGemm's, 40 are not. One token, few, and more than a block of 16."""
    check_products(kind, torch.bfloat16, (4, 36, 48, 100, 128, 384), (1, 3, 16, 40), (1, 5, 17))
    for dtype in (torch.float16, torch.float32):  # a plain product, whatever the shape
        check_products(kind, dtype, (36, 128), (3, 16), (1, 17))


@pytest.mark.zoo
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["qfloat8", "qint8", "qint4", "qint2"])
def test_every_odd_shape(kind, dtype):
    columns = 4, 8, 12, 16, 36, 48, 100, 128, 200, 208, 256, 384
    check_products(kind, dtype, columns, (1, 2, 3, 5, 8, 16, 40, 64), (1, 3, 5, 17))


def test_float8_survives_a_row_of_zeros():
    patch_quanto()
    layer = torch.nn.Linear(32, 4, bias=False)
    layer.weight.data[1] = 0
    layer = optimum.quanto.QLinear.from_module(layer, weights=optimum.quanto.qfloat8)
    layer.freeze()
    answer = layer(torch.randn(2, 32))
    assert answer.isfinite().all() and (answer[:, 1] == 0).all()


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
        from _qwquanto.worker.quanto import patch_quanto
        patch_quanto(as_shipped=True)
        print(hasattr(qbytes_mm, "shipped"))
        patch_quanto()
        print(hasattr(qbytes_mm, "shipped"))
    """
    assert in_plain_python(code) == (0, "False\nTrue\n")
