"""Quanto's numbers as plain tensors: every shape and dtype against float64."""

import optimum.quanto
import pytest
import torch
from models import KINDS, PRECISIONS, beginning, compile_and_compare, random_model, trained

from _qwquanto.compiled.layers import (
    DequantLinear,
    PerChannelLinear,
    SharedProducts,
    TinyGemmLinear,
    dequant_linear,
    merge_layers,
    swap_layers,
)
from _qwquanto.compiled.prepare import SCRIPT_STEP

pytestmark = pytest.mark.usefixtures("fresh")


def test_int4_on_a_cpu_keeps_tinygemms_tensors():
    """Layers of more than 128 inputs, and a multiple of 16 outputs."""
    model = random_model("llama", "int4", hidden_size=256, intermediate_size=512)
    assert isinstance(dequant_linear(model.model.layers[0].mlp.up_proj), TinyGemmLinear)
    assert compile_and_compare(model).way == SCRIPT_STEP


@pytest.mark.parametrize("weights", PRECISIONS)
@pytest.mark.parametrize(("rows", "columns"), [(24, 100), (1, 64), (7, 20), (40, 256), (48, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_odd_shapes(rows, columns, dtype, weights):
    """One token and several through each kind of layer, against float64; the input is not contiguous."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(columns, rows, dtype=dtype)
    if weights != "none":
        linear = optimum.quanto.QLinear.from_module(linear, weights=KINDS[weights])
        linear.freeze()
    weight = linear.weight if weights == "none" else linear.weight.dequantize()
    layer = dequant_linear(linear)
    for tokens in (1, 5):
        x = torch.randn(1, columns, tokens, dtype=dtype).transpose(1, 2)
        wanted = x.double() @ weight.double().t() + linear.bias.double()
        with torch.no_grad():
            assert (layer(x) - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize("weights", ["int8", "int4", "int2"])
def test_odd_shapes_compiled(weights):
    """Widths that four values do not divide, and that int8's kernel gets wrong: Quanto crashes there."""
    shape = {"hidden_size": 40, "intermediate_size": 90, "head_dim": 10}
    model, reference = (random_model("llama", weights, **shape) for _ in range(2))
    for name, module in list(reference.named_modules()):
        if isinstance(module, optimum.quanto.QLinear):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
            reference.set_submodule(name, plain)
    compile_and_compare(model, reference=reference)


def test_layers_with_one_input_share_a_product_and_no_memory(tiny):
    model = trained(tiny, "int8")
    swap_layers(model)
    merge_layers(model)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert attention.q_proj.merged == attention.k_proj.merged == attention.v_proj.merged != ()
    assert mlp.gate_proj.merged == mlp.up_proj.merged != () and not mlp.down_proj.merged
    storages = {layer.data.untyped_storage().data_ptr() for layer in (mlp.gate_proj, mlp.up_proj)}
    assert storages == {mlp.up_proj.merged[0].data.untyped_storage().data_ptr()}
    x = torch.randn(1, 1, 128, dtype=torch.bfloat16)
    alone = mlp.up_proj.product(x[0])
    assert torch.equal(mlp.up_proj(x)[0], alone)


@pytest.mark.parametrize(("capability", "calls"), [("AVX2", 8), ("AVX512", 0)])
def test_int8_on_a_cpu_takes_torchs_kernel_or_sums(tiny, monkeypatch, capability, calls):
    """Without AVX512 the kernel, once for q, k and v, once for gate and up: four a layer and step."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = trained(tiny, "int8")
    options, counts = compile_and_compare(model).options, []
    for tokens in (2, 3):
        with torch.profiler.profile() as profile:
            model.generate(beginning(tiny, 12), max_new_tokens=tokens, do_sample=False, **options)
        counts += [sum(e.key == "aten::_weight_int8pack_mm" for e in profile.events())]
    assert counts[1] - counts[0] == calls


def test_int8s_kernel_gets_addresses_that_it_can_load(monkeypatch):
    """A part of another layer's output at an odd place: without a copy this process would crash."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    torch.manual_seed(0)
    layers = []
    for rows in (96, 64):
        data = torch.randint(-127, 128, (rows, 64), dtype=torch.int8)
        layers.append(PerChannelLinear(None, data, torch.rand(rows, 1).bfloat16()))
    part = lambda x: layers[1](layers[0](x)[..., 1:65])
    x = torch.randn(1, 1, 64).bfloat16()
    for answer in (part(x), torch.compile(part, fullgraph=True)(x)):
        wanted = layers[0](x)[..., 1:65].double() @ (layers[1].data.double() * layers[1].scale.double()).t()
        assert (answer - wanted).norm() / wanted.norm() < 0.01


def test_a_product_asked_for_twice_is_computed_once():
    graph = torch.fx.Graph()
    x, w, s = (graph.placeholder(name) for name in "xws")
    products = [graph.call_function(torch.ops.qwquanto.gemv.default, (x, w, s)) for _ in range(3)]
    graph.output(tuple(products))
    SharedProducts()(graph)
    assert [node.op for node in graph.nodes].count("call_function") == 1


def test_an_adapter_with_a_forward_of_its_own_stays():
    class Router(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).topk(1)

    model = torch.nn.ModuleDict({"router": Router(16, 4), "linear": torch.nn.Linear(16, 4)})
    swap_layers(model)
    assert type(model["router"]) is Router and isinstance(model["linear"], DequantLinear)


def test_float8_is_read_bit_by_bit_where_the_hardware_cannot():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.float().isnan()][None]
    layer = PerChannelLinear(None, numbers, torch.ones(1, 1))
    layer.emulated = True
    assert torch.equal(layer.to_float(numbers), numbers.float())
