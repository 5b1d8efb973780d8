"""Which way a model is compiled, what is refused, and the step in any program."""

import functools
import math
import re

import pytest
import torch
import zoo
from conftest import ANSWER, ROOT
from models import beginning, compile_and_compare, random_model, trained
from transformers import AutoConfig

from _qwquanto.channel import Failure
from _qwquanto.compiled import prepare
from _qwquanto.compiled.prepare import STATIC_CACHE, compile_decode, max_positions

pytestmark = pytest.mark.usefixtures("fresh")


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


def test_two_models_in_one_program_keep_apart(tiny):
    """Their steps share source code, and no guard tells them apart."""
    first, second = trained(tiny, "int8"), random_model("qwen2", "int8")
    compile_and_compare(first)
    compile_and_compare(second)


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
