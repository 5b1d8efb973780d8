"""Measuring with a fake generate() and a fake clock: what was called and counted, never how long it took."""

import os
from types import SimpleNamespace

import pynvml
import pytest
import torch
from results import run as run_of
from results import settings
from transformers import Qwen2Config

import qwquanto
from _qwquanto.channel import CHANNEL, SILENCE_S, Failure, step
from _qwquanto.compiled.prepare import SCRIPT_STEP, CompiledDecode
from _qwquanto.results import Benchmark, Result, from_json, write_results
from _qwquanto.stats import joules_per_token, utilization
from _qwquanto.worker import generation, measure
from _qwquanto.worker.devices import busy_note, choose_devices, energy_j, nvml_handles
from _qwquanto.worker.generation import (
    WARMUP_S,
    WARMUP_TOKENS,
    Bench,
    measure_prefill,
    run_once,
    timed_runs,
    try_torch_compile,
    warmup_runs,
)
from _qwquanto.worker.loading import place_model
from _qwquanto.worker.measure import measure_compiled


class FakeTime:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class FakeModel:
    """generate() that takes `first` seconds to the first token, `gap` for each other, and gives `tokens`.

    7 and 8 end an answer.
    """

    def __init__(self, time, tokens, gap=0.5, first=2.0):
        self.time, self.tokens, self.gap, self.first, self.calls = time, tokens, gap, first, []

    def generate(self, ids, attention_mask, stopping_criteria, return_dict_in_generate, **options):
        self.calls.append(options | {"seed": torch.initial_seed()})
        for i, token in enumerate(self.tokens[: options["max_new_tokens"]]):
            self.time.now += self.gap if i else self.first
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            stop = [criterion(ids, None) for criterion in stopping_criteria]
            if any(stop) or token in (7, 8):
                break
        self.time.now += 0.25  # what generate() does after the last token
        return SimpleNamespace(sequences=ids, past_key_values=None)


def bench(model, new_tokens=10, **constants):
    prompt = torch.ones(1, 3, dtype=torch.long)
    return Bench(settings(**constants), model=model, prompt=prompt, new_tokens=new_tokens)


@pytest.fixture
def time(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(generation, "time", fake)
    return fake


@pytest.fixture
def messages(monkeypatch):
    """What the worker says to the program."""
    said = []
    monkeypatch.setattr(CHANNEL, "send", lambda **message: said.append(message))
    return said


def test_n_tokens_have_n_minus_one_intervals(time):
    run = run_once(bench(FakeModel(time, [1, 2, 3, 4, 8])), 5, "run")
    assert (run.prompt_tokens, run.generated_tokens, run.stop_reason, run.seed) == (3, 5, "eos", 5)
    assert (run.ttft_s, run.latency_s, run.inter_token_s) == (2.0, 4.25, [0.5] * 4)
    assert run.decode_tokens_per_s == 2.0 and run.tokens_per_s == pytest.approx(5 / 4.25)
    assert run.energy_j is None


def test_a_model_that_stops_at_its_first_token_counts(time):
    run = run_once(bench(FakeModel(time, [7])), 0, "run")
    assert (run.generated_tokens, run.stop_reason) == (1, "eos")
    assert run.decode_tokens_per_s is None and run.inter_token_s == []


@pytest.mark.parametrize(
    ("seconds", "most", "reason", "tokens"),
    [
        (3.4, 10, "time", 4),
        (60, 3, "length", 3),
        (2.9, 3, "length", 3),
    ],  # the last one passes the limit: it is whole
)
def test_runs_end_by_time_and_by_length(time, seconds, most, reason, tokens):
    run = run_once(bench(FakeModel(time, [1] * 10), most, max_seconds=seconds), 0, "run")
    assert (run.stop_reason, run.generated_tokens) == (reason, tokens)


def test_the_warm_up_keeps_max_new_tokens_and_ends_early(time):
    def warm(gap):
        model = FakeModel(time, [1] * 100, gap=gap, first=gap)
        run = run_once(bench(model, new_tokens=100), 0, "warm-up", warm_up=True)
        assert model.calls[0]["max_new_tokens"] == 100  # the same static cache as in the timed runs
        return run.generated_tokens

    assert warm(10.0) == WARMUP_TOKENS  # slow: a few tokens
    assert warm(0.125) == WARMUP_S / 0.125  # fast: a few seconds


def test_short_warm_up_runs_are_repeated(time):
    def runs(wanted):
        model = FakeModel(time, [1] * 4, gap=0.25, first=0.5)  # 1.5 s each
        return len(warmup_runs(bench(model, warmup_runs=wanted)))

    assert [runs(0), runs(1), runs(6)] == [0, 4, 6]


def test_the_compiled_steps_warm_up_stands_beside_the_eager_one(time, monkeypatch):
    mine = bench(FakeModel(time, [1] * 4), warmup_runs=3, compile=True)
    r = Result(mine.settings, warmup=[run_of(9)], runs=[run_of(9)])
    monkeypatch.setattr(measure, "prepare_compiled_decode", lambda *_: CompiledDecode(SCRIPT_STEP, 3, {}))
    monkeypatch.setattr(measure, "timed_runs", lambda *_: None)
    measure_compiled(mine, r, None)
    assert r.warmup == r.runs == [run_of(9)] and len(r.compiled.warmup) == 3


def test_options_and_seeds_that_generate_gets(time):
    model = FakeModel(time, [1] * 10)
    run_once(bench(model), 3, "run")
    run_once(bench(model, compare=("int8",), do_sample=False), 4, "run")
    sampled = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.7, "pad_token_id": 0, "seed": 3}
    greedy = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "seed": 4}
    assert model.calls == [sampled, greedy]


def test_energy_is_a_difference_per_device_and_unknown_without_a_counter(time, monkeypatch):
    counters = {"a": iter((10_000, 14_000)), "b": iter((5_000, 6_000))}  # millijoules
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: next(counters[handle]))
    mine = bench(FakeModel(time, [1] * 10))
    mine.handles = {"cuda:0": "a", "cuda:1": "b"}
    run = run_once(mine, 0, "run")
    assert run.energy_j == {"cuda:0": 4.0, "cuda:1": 1.0} and joules_per_token([run]) == 0.5
    mine.handles = {}
    assert run_once(mine, 0, "run").energy_j is None


def test_every_run_is_handed_on_and_so_is_its_progress(time, messages):
    mine = bench(FakeModel(time, [1] * 5), new_tokens=5, seed=7)
    result = Result(mine.settings)
    timed_runs(mine, result, result, 2)
    assert [run.seed for run in result.runs] == [7, 8]
    saved = [len(message["result"]["runs"]) for message in messages if "result" in message]
    assert saved == [1, 2]
    shown = [(m["status"], m["fraction"]) for m in messages if "status" in m]
    assert shown[0] == ("run 1 of 2: reading the prompt", None)
    assert shown[1] == ("run 1 of 2: 1 tokens, 0.5 tokens/s", 0.2)
    assert shown[2] == ("run 1 of 2: 2 tokens, 0.8 tokens/s", 0.4)
    assert shown[-1][0] == "4 s to go, run 2 of 2: 5 tokens, 1.2 tokens/s"
    assert "peak of runs" in result.memory


def test_a_prompt_takes_as_long_as_it_takes_and_tokens_do_not(time, messages):
    """The parent ends a worker that is silent for `timeout_s`: never while a prompt is read."""
    mine = bench(FakeModel(time, [1] * 5, gap=0.001, first=0.001), new_tokens=5)
    with step("running the model"):
        run_once(mine, 0, "run")
    limits = [(m["status"], m["timeout_s"]) for m in messages]
    assert limits[1:] == [("run: reading the prompt", None), ("run: 1 tokens, 1000.0 tokens/s", SILENCE_S)]
    messages.clear()
    with step("trying torch.compile(model) as written", timeout_s=5):  # compiles in its first prompt
        run_once(mine, 0, "run")
    assert [m["timeout_s"] for m in messages] == [5, 5, 5]


def test_prefill_is_512_tokens_a_median_and_a_single_one_on_a_slow_machine(time):
    calls = []

    class Prefill:
        config = Qwen2Config(vocab_size=100, max_position_embeddings=2048)

        def generate(self, ids, stopping_criteria, **_):
            calls.append(ids.shape[1])
            time.now += next(self.seconds)
            stopping_criteria[0](ids, None)
            sequences = torch.cat([ids, ids[:, :1]], 1)
            return SimpleNamespace(sequences=sequences, past_key_values=None)

    def measured(*seconds):
        calls.clear()
        model = Prefill()
        model.seconds = iter(seconds)  # of each call
        result = Result(settings())
        measure_prefill(bench(model), result)
        assert set(calls) == {result.prefill_tokens} == {512}
        return result.prefill_tokens_per_s, len(result.prefill_rates)

    assert measured(2.0, 1.0, 0.5, 1.0) == (512, 3)  # the first is not counted
    assert measured(16.0) == (32, 1)
    assert measured(8.0, 4.0) == (128, 1)


def test_utilization_over_two_gpus_is_the_sum_of_each_ones_time():
    r = Result(settings(), memory_bytes_per_s={"cuda:0": 3000.0, "cuda:1": 500.0}, bytes_per_token=400)
    r.device_weight_bytes = {"cuda:0": 300, "cuda:1": 100}
    assert utilization(r, [run_of(2.0)]) == pytest.approx((0.1 + 0.2) * 2)
    r.bytes_per_token = 200  # half of them: an untied input embedding
    assert utilization(r, [run_of(2.0)]) == pytest.approx(0.1 + 0.2)
    r.bytes_per_token = None
    assert utilization(r, [run_of(2.0)]) is None
    r.bytes_per_token = 400
    del r.memory_bytes_per_s["cuda:1"]
    assert utilization(r, [run_of(2.0)]) is None


def test_nvml_finds_the_gpu_by_uuid_not_by_number(monkeypatch):
    asked = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: asked.append(uuid) or "handle")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda *_: SimpleNamespace(used=0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-of-{device}")
    )
    handles, notes = nvml_handles(["cuda:1"])
    assert (handles, notes, asked) == ({"cuda:1": "handle"}, [], ["GPU-uuid-of-cuda:1"])


def test_nvml_absent_is_told_once_and_its_figures_are_unknown(monkeypatch):
    def absent():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    handles, notes = nvml_handles(["cuda:0"])
    assert handles == {} and len(notes) == 1 and "no NVML" in notes[0]
    assert energy_j(handles) == {}


def test_a_gpu_that_this_torch_cannot_use_is_told_loudly(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices, notes = choose_devices("auto")
    assert devices == ["cpu"] and f"NVIDIA H200, but this torch ({torch.__version__}) cannot" in notes[0]
    assert "pip install torch --index-url" in notes[0] and "driver is too old" in notes[0]
    assert choose_devices("cpu") == (["cpu"], [])
    with pytest.raises(Failure, match="no device cuda:1 here"):
        choose_devices("cuda:1")


def test_gpus_are_tried_until_one_works(monkeypatch):
    """The others are left alone: trying one takes hundreds of MB of it."""
    tried, ones = [], torch.ones

    def first_is_broken(size, device):
        tried.append(device)
        if device == "cuda:0":
            raise RuntimeError("no kernel image is available")
        return ones(size)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "ones", first_is_broken)
    devices, notes = choose_devices("auto")
    assert devices == ["cuda:1", "cuda:2"] and tried == ["cuda:0", "cuda:1"]
    assert notes == ["cuda:0 does not work: no kernel image is available"]


def test_a_busy_processor_is_noted(monkeypatch):
    for percent, notes in ((5.0, 0), (60.0, 1)):
        monkeypatch.setattr("psutil.cpu_percent", lambda interval, percent=percent: percent)
        assert len(busy_note("at the start")) == notes


@pytest.mark.parametrize("graphs", [0, 3])
def test_torch_compile_as_written_is_a_few_tokens_and_a_count_of_graphs(time, messages, monkeypatch, graphs):
    mine, counts = bench(FakeModel(time, [1] * 40), 40), iter((5, 5 + graphs))
    wrapped, result = FakeModel(time, [1] * 40), Result(settings())
    monkeypatch.setattr(torch, "compile", lambda model: wrapped)
    monkeypatch.setattr(generation, "graphs_compiled", lambda: next(counts))
    try_torch_compile(mine, result)
    assert [call["max_new_tokens"] for call in wrapped.calls] == [4] and mine.model.calls == []
    assert result.torch_compile_graphs == graphs


def test_one_gpu_if_the_model_fits_it_else_all(monkeypatch, messages):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False, dtype=torch.float32, device="meta"))
    model.get_output_embeddings = lambda: None
    free, total = {"cuda:0": 200, "cuda:1": 1000}, [1000]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], *total))
    model.dtype = torch.float32

    def place():
        placed, _ = place_model(settings(weights=None), list(free), model, 256)
        return placed, "tried all the same" in messages[-1]["log"]

    assert place() == (["cuda:1"], False)
    free["cuda:1"] = 200
    assert place() == (["cuda:0", "cuda:1"], False)
    free["cuda:1"] = 10
    assert place() == (["cuda:0", "cuda:1"], True)
    total[0] = 100
    with pytest.raises(Failure, match="need"):
        place()


def benchmark(**fields):
    return Benchmark([Result(settings(), **fields)])


def test_results_go_where_a_link_points(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    write_results(str(tmp_path / "link.json"), benchmark())
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "target.json").read_text().startswith("{")


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(str(path), benchmark(load_s=1.5))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_results(str(path), benchmark(load_s=2.5))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    (found,) = from_json(path.read_text(encoding="utf-8")).results
    assert found.load_s == 1.5 and found.settings.model_name == qwquanto.MODEL_NAME


def test_a_question_in_another_encoding_is_written_all_the_same(tmp_path):
    write_results(str(tmp_path / "r.json"), Benchmark([Result(settings(question="caf\udce9"))]))
    assert from_json((tmp_path / "r.json").read_text(encoding="utf-8")).results[0].settings.question == "caf?"
