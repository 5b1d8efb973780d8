"""The order of a measurement, and the question's tokens."""

import pytest
from fake_model import FakeModel, bench
from models import load
from results import run as run_of
from results import settings

from _qwquanto.channel import Failure
from _qwquanto.compiled.prepare import SCRIPT_STEP, CompiledDecode
from _qwquanto.results import Result
from _qwquanto.worker import measure
from _qwquanto.worker.checkpoint import load_tokenizer
from _qwquanto.worker.measure import measure_compiled, tokenize


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
