"""The order of a measurement, and the question's tokens."""

import dataclasses
import re

import pytest
from conftest import QUESTION
from fake_model import FakeModel, bench
from models import load
from results import piped, settings
from results import run as run_of
from transformers import AutoConfig

from _qwquanto.channel import Failure
from _qwquanto.compiled.prepare import SCRIPT_STEP, CompiledDecode
from _qwquanto.results import Benchmark, Result
from _qwquanto.worker import measure
from _qwquanto.worker.checkpoint import load_tokenizer
from _qwquanto.worker.measure import measure_compiled, tokenize


@pytest.fixture
def measured(tiny, monkeypatch, messages, tmp_path):
    """Measures the tiny model as a worker does; without what takes seconds and decides nothing."""
    monkeypatch.setattr(measure, "memory_bandwidth", lambda device: 1e10)

    def measure_it(folder=None, **constants):
        known = {"model_name": tiny, "question": QUESTION, "device": "cpu", "runs": 1, "warmup_runs": 0}
        result = Result(settings(**known | {"max_length": 40, "compare_tokens": 20} | constants), folder)
        measure.measure(result, str(tmp_path) if result.settings.compare else None)
        assert messages[-1] == {"result": dataclasses.asdict(result)}
        return result

    return measure_it


def raising(error):
    def raises(*_, **__):
        raise error

    return raises


NO_COMPILER = RuntimeError("InvalidCxxCompiler: No working C++ compiler found")


def test_where_compiling_fails_the_eager_model_is_judged_and_recommended(measured, monkeypatch):
    monkeypatch.setattr(measure, "prepare_compiled_decode", raising(NO_COMPILER))
    monkeypatch.setattr(measure, "try_torch_compile", lambda *_: None)
    compared = {"compare": ["none", "int8"], "compile": True, "quality_tokens": 40, "compare_tokens": 40}
    none, int8 = (measured(**compared, weights=weights) for weights in (None, "int8"))
    for r in (none, int8):
        assert r.eager_complete and not r.complete and r.unavailable
    assert int8.quality.kl_divergence < 0.05 and int8.prefill_tokens == 512
    shown = piped(Benchmark([none, int8]))
    assert re.search("^Take (bf16|int8): it ", shown, re.MULTILINE)
    assert "unavailable: needs a C++ compiler" in shown
    assert "bf16 ✗" not in shown and "int8 ✗" not in shown, "what the tables show was measured"


def test_where_compiling_fails_a_single_run_has_its_eager_row(measured, monkeypatch):
    monkeypatch.setattr(measure, "prepare_compiled_decode", raising(NO_COMPILER))
    r = measured(compile=True)
    assert r.unavailable and r.prefill_tokens == 512
    shown = piped(Benchmark([r]))
    assert "--compile unavailable: needs a C++ compiler" in shown
    assert re.search(r"^\| int8 +\|", shown, re.MULTILINE) and "int8 ✗" not in shown


@pytest.mark.parametrize(
    ("place", "step", "ends_comparison"),
    [
        ("choose_devices", "looking for a device", True),
        ("check_checkpoint", "getting the model", True),
        ("tokenize", "reading the model's configuration", True),
        ("nvml_handles", "reading the model's configuration", False),  # another precision may do
        ("load_model", "loading the model", False),
        ("timed_runs", "running the model", False),
        ("measure_prefill", "measuring prefill", False),
    ],
)
def test_an_error_anywhere_becomes_the_results_failure(measured, monkeypatch, place, step, ends_comparison):
    monkeypatch.setattr(measure, place, raising(ValueError("odd")))
    r = measured()
    assert r.failure == f"ValueError while {step}: odd (--debug shows more)" and not r.unavailable
    assert not r.complete and not r.eager_complete and r.ends_comparison == ends_comparison
    assert bool(r.load_s) == (place in ("timed_runs", "measure_prefill")), "what was measured before stays"


def test_files_that_a_worker_before_has_got_are_taken(measured, monkeypatch, tiny):
    monkeypatch.setattr(measure, "download_model", raising(AssertionError("the Hub was asked")))
    r = measured(tiny, model_name="them/tiny")
    assert r.complete and (r.folder, r.settings.model_name) == (tiny, "them/tiny")


def test_the_compiled_steps_warm_up_stands_beside_the_eager_one(time, monkeypatch):
    mine = bench(FakeModel(time, [1] * 4), warmup_runs=3, compile=True)
    r = Result(mine.settings, warmup=[run_of(9)], runs=[run_of(9)])
    monkeypatch.setattr(measure, "prepare_compiled_decode", lambda *_: CompiledDecode(SCRIPT_STEP, 3, {}))
    monkeypatch.setattr(measure, "timed_runs", lambda *_: None)
    measure_compiled(mine, r, None)
    assert r.warmup == r.runs == [run_of(9)] and len(r.compiled.warmup) == 3


def test_a_question_without_room_is_refused(tiny):
    model, tokenizer = load(tiny, "int8"), load_tokenizer(tiny, tiny, False)
    count = tokenize(settings(), tokenizer, model.config).shape[1]
    assert tokenize(settings(max_length=count + 1), tokenizer, model.config).shape[1] == count
    with pytest.raises(Failure, match=f"has {count} tokens; MAX_LENGTH allows 1 to {count - 1}"):
        tokenize(settings(max_length=count), tokenizer, model.config)
    with pytest.raises(Failure, match="the model allows 1 to 4095"):
        tokenize(settings(question="+" * 9000, compare=("int8",)), tokenizer, model.config)


def test_a_missing_chat_template_is_named(tiny):
    with pytest.raises(Failure, match="tiny has no chat template: it is no chat model; leave --chat out"):
        config = AutoConfig.from_pretrained(tiny)
        tokenize(settings(model_name="tiny", chat=True), load_tokenizer(tiny, tiny, False), config)
