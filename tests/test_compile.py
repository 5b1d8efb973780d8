"""Compiled decode on the CPU: Quanto's results, no recompilation, any program; upstream's defects stand."""

import functools
import inspect
import re

import optimum.quanto
import pytest
import torch
import transformers
from conftest import ANSWER, QUESTION, ROOT
from transformers.cache_utils import StaticSlidingWindowLayer

from _qwquanto.channel import Failure
from _qwquanto.compiled import prepare
from _qwquanto.compiled.layers import (
    DequantLinear,
    PerChannelLinear,
    SharedProducts,
    TinyGemmLinear,
    dequant_linear,
    merge_layers,
    swap_layers,
)
from _qwquanto.compiled.prepare import (
    SCRIPT_STEP,
    STATIC_CACHE,
    compile_decode,
    graphs_compiled,
    prepare_compiled_decode,
)
from _qwquanto.compiled.step import bucketed_attention, draw_token
from _qwquanto.worker.quanto import patch_quanto

SIZE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip
PRECISIONS = ("none", "float8", "int8", "int4", "int2")
KINDS = {name: getattr(optimum.quanto, f"q{name}") for name in PRECISIONS[1:]}


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before, and Quanto as the script mends it."""
    torch._dynamo.reset()
    patch_quanto()


def quantized(model, weights):
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    if weights != "none":
        optimum.quanto.quantize(model, weights=KINDS[weights], exclude="lm_head")
        optimum.quanto.freeze(model)
    return model


def trained(folder, weights):
    return quantized(transformers.AutoModelForCausalLM.from_pretrained(folder), weights)


def beginning(folder, length):
    """The first tokens of what the tiny model recites, [1, length]: what comes next is never a near tie."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.tensor([[*tokenizer(QUESTION).input_ids, *tokenizer(ANSWER).input_ids][:length]])


def random_model(name, weights="none", **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SIZE | options)
    return quantized(transformers.AutoModelForCausalLM.from_config(config), weights)


def logits(model, prompt, length, forced=None, **options):
    """Logits of each new token, [length, vocabulary]; the tokens are `forced`, if given."""
    kept = []

    def keep(ids, scores):
        kept.append(scores[0].clone())
        if forced is not None:
            scores = torch.full_like(scores, -torch.inf)
            scores[0, forced[len(kept) - 1]] = 0
        return scores

    model.generate(
        prompt, max_new_tokens=length, do_sample=False, pad_token_id=0, logits_processor=[keep], **options
    )
    return torch.stack(kept)


def compile_and_compare(model, length=20, max_tokens=64, reference=None):
    """Compile a model; its logits for two prompts must be the eager ones within bf16's rounding.

    The eager ones are the `reference`'s, if given.
    """
    prompts = torch.arange(40, 50)[None], torch.arange(40, 45)[None]
    eager = [logits(reference or model, prompt, length) for prompt in prompts]
    done = prepare_compiled_decode(model, max_tokens)
    graphs, any_clear = graphs_compiled(), False
    for prompt, wanted in zip(prompts, eager, strict=True):
        found = logits(model, prompt, length, wanted.argmax(-1).tolist(), **done.options)
        top = wanted.topk(2).values
        clear = top[:, 0] - top[:, 1] > 0.03 * top[:, 0].abs()  # several times the rounding of bfloat16
        any_clear = any_clear or clear.any().item()
        assert (found.argmax(-1) == wanted.argmax(-1))[clear].all()
        assert (found - wanted).norm() / wanted.norm() < 0.02
    assert any_clear and graphs_compiled() == graphs
    return done


@pytest.mark.parametrize("weights", PRECISIONS)
def test_compiled_logits_are_quantos(tiny, weights):
    """Four graphs, of layers, norm, positions and output, serve all layers and buckets."""
    done = compile_and_compare(trained(tiny, weights), *((270, 300) if weights == "int8" else (20, 64)))
    assert (done.way, done.graphs) == (SCRIPT_STEP, 4)


def test_int4_on_a_cpu_keeps_tinygemms_tensors():
    """Layers of more than 128 inputs, and a multiple of 16 outputs."""
    model = random_model("llama", "int4", hidden_size=256, intermediate_size=512)
    assert isinstance(dequant_linear(model.model.layers[0].mlp.up_proj), TinyGemmLinear)
    assert compile_and_compare(model).way == SCRIPT_STEP


WINDOWS = {"sliding_window": 16, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("name", "weights", "options"),
    [
        ("mistral", "int8", WINDOWS),
        ("gemma2", "none", WINDOWS | {"head_dim": 16}),
        ("gemma3_text", "int4", WINDOWS | {"head_dim": 16}),
        ("olmo3", "int8", WINDOWS),
        ("cohere2", "none", WINDOWS),
        ("falcon", "int2", {}),
        ("stablelm", "int8", {}),
    ],
)
def test_other_attention_goes_transformers_way(name, weights, options):
    """24 tokens beyond a window of 16, soft caps, alternating caches, no attention interface."""
    done = compile_and_compare(random_model(name, weights, **options))
    assert (done.way, done.graphs) == (STATIC_CACHE, 1)


def test_a_program_of_ones_own(tiny):
    """What README shows: the same greedy text as eager, for prompts of any length, as often as one likes."""
    model = trained(tiny, "int8")
    prompts = [beginning(tiny, length) for length in (12, 1, 5)]
    greedy = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    eager = [model.generate(ids, **greedy) for ids in prompts]
    options = compile_decode(model, max_tokens=64)
    for ids, wanted in zip(prompts * 2, eager * 2, strict=True):
        assert torch.equal(model.generate(ids, **greedy, **options), wanted)
    with pytest.raises(Failure, match="make 112 tokens"):
        model.generate(prompts[0], max_new_tokens=100, pad_token_id=0, **options)
    with pytest.raises(Failure, match="options"):
        model.generate(prompts[0], **greedy)
    with pytest.raises(Failure, match="one sequence"):
        model.generate(prompts[0].repeat(2, 1), **greedy, **options)
    with pytest.raises(Failure, match="padding"):
        model.generate(prompts[0], attention_mask=torch.tensor([[0, *[1] * 11]]), **greedy, **options)
    with pytest.raises(Failure, match="already"):
        compile_decode(model, max_tokens=64)


def test_the_lines_of_the_readme_run(tiny):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"<!-- compile_decode -->\n```python\n(.*?)```", readme, re.DOTALL)
    names = {"folder": tiny}
    exec(lines, names)
    assert ANSWER in names["tokenizer"].decode(names["ids"][0])


def test_generate_gives_what_it_gives_uncompiled(tiny):
    """An end token, a stopping criterion, a streamer, scores; and tensors where no dictionary is wanted."""

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, ids = trained(tiny, "int8"), beginning(tiny, 12)
    greedy = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    answer = model.generate(ids, **greedy)[0, 12:].tolist()
    asked = [
        {"eos_token_id": answer[7]},
        {"stopping_criteria": [lambda tokens, scores: tokens.shape[1] >= 20]},
        {
            "return_dict_in_generate": True,
            "output_scores": True,
            "output_logits": True,
            "repetition_penalty": 1.5,
        },
    ]
    wanted = [model.generate(ids, **greedy, **more) for more in asked]
    options = compile_decode(model, max_tokens=64)
    found = [model.generate(ids, **greedy, **more, **options) for more in asked]
    assert torch.equal(found[0], wanted[0]) and found[0].shape[1] < 12 + 30 and found[0][0, -1] == answer[7]
    assert torch.equal(found[1], wanted[1]) and found[1].shape[1] == 20
    assert torch.equal(found[2].sequences, wanted[2].sequences)
    for kind in ("scores", "logits"):
        both = [torch.cat(getattr(one[2], kind)) for one in (found, wanted)]
        assert both[0].shape == (30, 320) and (both[0] - both[1]).norm() / both[1].norm() < 0.02
    streamer = Streamer()
    model.generate(ids, **greedy, streamer=streamer, **options)
    assert streamer.ended and streamer.tokens == ids[0].tolist() + answer
    assert type(model).__name__ == "Qwen2ForCausalLM" and isinstance(model, transformers.Qwen2ForCausalLM)


def test_tokens_are_drawn_by_their_probability():
    """Of all, and of the best three: frequencies within four standard deviations; the others never."""
    torch.manual_seed(0)
    scores, times = torch.tensor([[0.0, 3.0, -2.0, 2.5, 1.0]]), 4000
    for top_k, allowed in ((None, [0, 1, 2, 3, 4]), (3, [1, 3, 4]), (9, [0, 1, 2, 3, 4])):
        probabilities = torch.zeros(5)
        probabilities[allowed] = scores[0, allowed].softmax(-1)
        drawn = torch.cat([draw_token(scores, True, top_k) for _ in range(times)])
        counts = torch.bincount(drawn.flatten(), minlength=5)
        spread = (times * probabilities * (1 - probabilities)).sqrt()
        assert ((counts - times * probabilities).abs() <= 4 * spread).all(), (top_k, counts)
    assert draw_token(scores, False, None).tolist() == [[1]]


def test_two_models_in_one_program_keep_apart(tiny):
    """Their steps share source code, and no guard tells them apart."""
    first, second = trained(tiny, "int8"), random_model("qwen2", "int8")
    compile_and_compare(first)
    compile_and_compare(second)


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


def with_activations(*functions):
    model = random_model("qwen2", "int8")
    for layer, function in zip(model.model.layers, functions, strict=True):
        del layer.mlp.act_fn
        layer.mlp.act_fn = function
    return model


def test_layers_that_differ_are_compiled_apart():
    assert compile_and_compare(with_activations(lambda x: x, lambda x: 1000 * x)).graphs == 5


def test_a_difference_that_no_signature_sees_is_found_out():
    """The second layer would answer as the first one does."""
    model = with_activations(functools.partial(torch.mul, 1.0), functools.partial(torch.mul, 1000.0))
    with pytest.raises(Failure, match="answers otherwise"):
        compile_decode(model, 64)


def test_what_transformers_does_not_compile_is_refused():
    with pytest.raises(Failure, match="transformers does not compile this model"):
        compile_decode(random_model("mamba"), 64)


def test_positions_that_change_are_refused():
    """longrope: Phi-3 drops its cache where the frequencies change, which a compiled step does not see."""
    factors = {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    model = random_model("phi3", rope_parameters=rope, original_max_position_embeddings=32, eos_token_id=None)
    with pytest.raises(Failure, match="32 tokens"):
        compile_decode(model, 64)
    compile_and_compare(model, 10, 32)


def test_nothing_compiled_is_a_failure(tiny, monkeypatch):
    monkeypatch.setattr(prepare, "graphs_compiled", lambda: 7)
    with pytest.raises(Failure, match="compiled nothing"):
        compile_decode(trained(tiny, "none"), 64)


def test_float8_is_read_bit_by_bit_where_the_hardware_cannot():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.float().isnan()][None]
    layer = PerChannelLinear(None, numbers, torch.ones(1, 1))
    layer.emulated = True
    assert torch.equal(layer.to_float(numbers), numbers.float())


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sliding_window", "position_bias"])
def test_unknown_attention_is_refused(name):
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(Failure, match=name):
        bucketed_attention(None, x, x, x, torch.ones(1, 1, 1, 8, dtype=torch.bool), **{name: 30.0})


def test_large_scores_in_float16_stay_finite():
    """Qwen2's queries and keys make products beyond float16's range before they are scaled."""
    torch.manual_seed(0)
    query, key, value = (300 * torch.randn(1, heads, n, 128) for heads, n in ((4, 1), (2, 8), (2, 8)))
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    halves = [t.half() for t in (query, key, value)]
    assert (halves[0] @ halves[1].repeat_interleave(2, 1).transpose(2, 3)).isinf().any()
    found, _ = bucketed_attention(None, *halves, mask, scaling=128**-0.5)
    exact = [t.double() for t in halves]
    wanted = torch.nn.functional.scaled_dot_product_attention(*exact, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(found.double(), wanted, rtol=1e-2)


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
