"""What the worker records of memory: the cache that was filled, a GPU before it is touched, the prefill."""

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
    result = Result(settings())
    measure_prefill(bench, result)
    assert result.memory["peak of prefill"]["rss"] > 0 and result.prefill_tokens == 95


def test_decoding_after_a_long_prompt_has_a_rate_of_its_own(monkeypatch):
    asked = []

    def fake(bench, title, prompt, **options):
        asked.append((prompt.shape[1], options["max_new_tokens"], options["eos_token_id"]))
        assert options["do_sample"] == bench.settings.do_sample, "a token is drawn as in the runs"
        first, gap = 2.0, (4.0, 0.5, 0.5, 0.4)[len(asked) - 1]  # the first does not count
        return [], [first + i * gap for i in range(options["max_new_tokens"])], 0.0

    monkeypatch.setattr(generation, "generate", fake)
    for positions, expected in ((2048, 2.0), (516, 2.0), (96, None)):
        asked.clear()
        config = LlamaConfig(**SMALL | {"max_position_embeddings": positions})
        prompt = torch.ones(1, 5, dtype=torch.long)
        result = Result(settings())
        measure_prefill(Bench(settings(), model=SimpleNamespace(config=config), prompt=prompt), result)
        assert result.decode_after_prefill_tokens_per_s == expected
        tokens = min(512, positions - 1)
        assert asked == [(tokens, min(9, positions - tokens), None)] * 4
        assert result.prefill_tokens_per_s == tokens / 2
