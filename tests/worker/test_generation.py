"""Generations by a fake clock: what was called and counted, never how long it took."""

from types import SimpleNamespace

import pynvml
import pytest
import torch
from conftest import QUESTION
from fake_model import FakeModel, bench
from models import load
from results import settings
from transformers import Qwen2Config

from _qwquanto.channel import SILENCE_S, step
from _qwquanto.results import Result
from _qwquanto.stats import joules_per_token
from _qwquanto.worker import generation
from _qwquanto.worker.checkpoint import load_tokenizer
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
from _qwquanto.worker.measure import tokenize


def test_n_tokens_have_n_minus_one_intervals(time):
    run = run_once(bench(FakeModel(time, [1, 2, 3, 4, 8])), 5, "run")
    assert (run.prompt_tokens, run.generated_tokens, run.stop_reason, run.seed) == (3, 5, "eos", 5)
    assert (run.ttft_s, run.latency_s, run.inter_token_s) == (2.0, 4.25, [0.5] * 4)
    assert run.decode_tokens_per_s == 2.0 and run.tokens_per_s == pytest.approx(5 / 4.25)
    assert run.energy_j is None


def test_times_are_of_work_that_is_done(time, monkeypatch):
    """A device that still works when generate() returns: 5 s of what came before, 3 s of this answer."""
    pending = [5.0]

    def synchronize(devices):
        time.now += pending.pop() if pending else 0

    class Late(FakeModel):
        def generate(self, *args, **options):
            output = super().generate(*args, **options)
            pending.append(3.0)
            return output

    monkeypatch.setattr(generation, "synchronize", synchronize)
    run = run_once(bench(Late(time, [1, 2, 3, 4, 8])), 5, "run")
    assert (run.ttft_s, run.inter_token_s, run.latency_s) == (2.0, [0.5] * 4, 4.25 + 3.0)
    assert not pending


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
        mine, result = bench(model), Result(settings())
        mine.positions_left = 1000
        measure_prefill(mine, result)
        assert set(calls) == {result.prefill_tokens} == {512}
        return result.prefill_tokens_per_s, len(result.prefill_rates)

    assert measured(2.0, 1.0, 0.5, 1.0) == (512, 3)  # the first is not counted
    assert measured(16.0) == (32, 1)
    assert measured(8.0, 4.0) == (128, 1)


@pytest.mark.parametrize("graphs", [0, 3])
def test_torch_compile_as_written_is_a_few_tokens_and_a_count_of_graphs(time, messages, monkeypatch, graphs):
    mine, counts = bench(FakeModel(time, [1] * 40), 40), iter((5, 5 + graphs))
    wrapped, result = FakeModel(time, [1] * 40), Result(settings())
    monkeypatch.setattr(torch, "compile", lambda model: wrapped)
    monkeypatch.setattr(generation, "graphs_compiled", lambda: next(counts))
    try_torch_compile(mine, result)
    assert [call["max_new_tokens"] for call in wrapped.calls] == [4] and mine.model.calls == []
    assert result.torch_compile_graphs == graphs


def test_a_seed_gives_its_answer_again(tiny):
    s = settings(model_name=tiny, question=QUESTION, temperature=5.0)
    model = load(tiny, "int8")
    tokenizer = load_tokenizer(tiny, tiny, False)
    prompt = tokenize(s, tokenizer, model.config)
    bench = Bench(s, model=model, tokenizer=tokenizer, prompt=prompt, new_tokens=20)
    answers = [run_once(bench, seed, "run").text for seed in (3, 4, 3)]
    assert answers[0] == answers[2] != answers[1]
