"""What the worker records of memory: the cache that was filled, a GPU before it is touched, the prefill."""

import contextlib
from types import SimpleNamespace

import pynvml
import pytest
import torch
from results import settings
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers.cache_utils import DynamicCache

from _qwquanto.results import Result
from _qwquanto.worker import devices, generation, measure
from _qwquanto.worker.devices import gpu_memory_in_use
from _qwquanto.worker.generation import Bench, cache_bytes_per_token, generate, measure_prefill

SMALL = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 96}


def layer(tokens, dtype=torch.bfloat16, **changes):
    """One of a cache: 2 heads of 8, keys and values."""
    held = torch.zeros(1, 2, tokens, 8, dtype=dtype)
    return SimpleNamespace(keys=held, values=held.clone(), **changes)


def cache(*layers):
    return SimpleNamespace(layers=layers)


def test_a_tokens_bytes_are_those_of_the_cache_that_was_filled():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).to(torch.bfloat16).eval()
    bench = Bench(settings(), model=model, prompt=torch.ones(1, 5, dtype=torch.long))
    generate(bench, "run", max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert bench.kv_bytes_per_token == 3 * 2 * 2 * 8 * 2  # layers, keys and values, heads, size, bytes


def test_a_compiled_steps_cache_says_nothing():
    bench = Bench(settings(), prompt=torch.ones(1, 5, dtype=torch.long), compiled=SimpleNamespace(options={}))
    answer = SimpleNamespace(sequences=bench.prompt, past_key_values=cache(layer(4)))
    bench.model = SimpleNamespace(generate=lambda *_, **__: answer)
    generate(bench, "run", max_new_tokens=4)
    assert bench.kv_bytes_per_token is None
    bench.compiled = None
    generate(bench, "run", max_new_tokens=4)
    assert bench.kv_bytes_per_token == 64


@pytest.mark.parametrize(
    ("layers", "bytes_per_token"),
    [
        ([layer(4), layer(4)], 128),
        ([layer(4, torch.float32)], 128),
        ([layer(4), SimpleNamespace(conv_states={})], 64),  # linear attention does not grow
        ([layer(4), SimpleNamespace(keys=None)], 64),
        ([layer(4), layer(4, is_sliding=True)], None),  # a window ends its growth
        ([layer(4), layer(3)], None),
        ([layer(0)], None),
        ([], None),
    ],
)
def test_layers_that_grow_alike_are_counted(layers, bytes_per_token):
    assert cache_bytes_per_token(cache(*layers)) == bytes_per_token


def test_a_cache_of_another_kind_is_unknown():
    assert cache_bytes_per_token(None) is None
    window = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    assert cache_bytes_per_token(DynamicCache(config=window)) is None


def test_a_gpus_memory_is_asked_before_the_gpu_is_touched(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "gpu_memory_in_use", lambda: order.append("asked") or {"cuda:0": 7})

    def choose(wanted):
        order.append("touched")
        raise RuntimeError(wanted)

    monkeypatch.setattr(measure, "choose_devices", choose)
    for device, calls in (("auto", ["asked", "touched"]), ("cpu", ["touched"])):
        order.clear()
        with pytest.raises(RuntimeError):
            measure.set_up(Bench(settings(device=device)), Result(settings()), False)
        assert order == calls


def test_every_gpus_memory_in_use_is_nvmls(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=device[-1]))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: int(uuid[-1]))
    monkeypatch.setattr(devices, "device_memory_used", lambda handle: 100 + handle)
    assert gpu_memory_in_use() == {"cuda:0": 100, "cuda:1": 101}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_memory_in_use() == {}


def test_a_gpu_that_does_not_work_has_no_memory_in_use(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    assert gpu_memory_in_use() == {}


def test_prefill_has_a_peak_of_its_own(monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *_, **__: ([1], [0.5], 0.5))
    config = LlamaConfig(**SMALL)
    bench = Bench(settings(), model=SimpleNamespace(config=config), prompt=torch.ones(1, 5, dtype=torch.long))
    bench.positions_left = 91
    result = Result(settings())
    measure_prefill(bench, result)
    assert result.memory["peak of prefill"]["rss"] > 0 and result.prefill_tokens == 95


def test_decoding_after_a_long_prompt_is_timed_in_turn_with_the_question(monkeypatch):
    """On a host that halves its speed between two pairs the ratio within each is the same."""
    asked = []

    def fake(bench, title, prompt=None, **options):
        asked.append(((bench.prompt if prompt is None else prompt).shape[1], options["max_new_tokens"]))
        assert options["do_sample"] == bench.settings.do_sample, "a token is drawn as in the runs"
        assert options["eos_token_id"] is None
        slow = [4.0, 0.5, 0.5, 1.0, *[0.5] * 20][(len(asked) - 1) // 2]  # the first pair does not count
        first, gap = 2.0, slow * (0.8 if prompt is None else 1.0)
        return [], [first + i * gap for i in range(options["max_new_tokens"])], 0.0

    for positions, rate, ratio in ((2048, 2.0, 0.8), (516, 2.0, 0.8), (96, None, None)):
        asked.clear()
        monkeypatch.setattr(generation, "generate", fake)
        config = LlamaConfig(**SMALL | {"max_position_embeddings": positions})
        prompt = torch.ones(1, 5, dtype=torch.long)
        made = Bench(settings(), model=SimpleNamespace(config=config), prompt=prompt)
        made.positions_left = positions - 5
        result = Result(settings())
        measure_prefill(made, result)
        assert result.decode_after_prefill_tokens_per_s == rate
        assert result.decode_after_prefill_ratio == (ratio and pytest.approx(ratio))
        tokens = min(512, positions - 1)
        new = min(9, positions - tokens)
        assert asked == ([(tokens, new), (5, new)] if ratio else [(tokens, new)]) * 4
        made.devices = ["mps"]  # a GPU's host is slow for seconds: more pairs
        asked.clear()
        monkeypatch.setattr(generation, "peak_memory", lambda *_: contextlib.nullcontext(dict))
        measure_prefill(made, Result(settings()))
        assert asked == ([(tokens, new), (5, new)] if ratio else [(tokens, new)]) * 12
        assert result.prefill_tokens_per_s == tokens / 2


def test_a_question_longer_than_the_prompt_of_prefill_is_not_in_its_peak(monkeypatch):
    """The peak is of the 512 tokens: what a token of context costs is computed from it."""
    seen = []

    def fake(bench, title, prompt=None, **options):
        seen.append(prompt is None)
        return [], [0.5, 1.0], 0.0

    @contextlib.contextmanager
    def peak_memory(*_):
        yield lambda: {"cuda:0 allocated": 900 if any(seen) else 500}

    monkeypatch.setattr(generation, "generate", fake)
    monkeypatch.setattr(generation, "peak_memory", peak_memory)
    made = Bench(settings(), model=SimpleNamespace(config=LlamaConfig(**SMALL)), positions_left=50)
    made.prompt = torch.ones(1, 60, dtype=torch.long)
    result = Result(settings())
    measure_prefill(made, result)
    assert any(seen) and result.memory["peak of prefill"] == {"cuda:0 allocated": 500}
