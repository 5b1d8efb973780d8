"""KL along the reference's text, how it is drawn, and the file that holds it."""

import itertools
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import QUESTION
from results import result, settings

from _qwquanto.channel import Failure
from _qwquanto.results import Benchmark, Result, to_json
from _qwquanto.stats import answer_quality
from _qwquanto.verdicts import grave_warnings
from _qwquanto.worker import generation
from _qwquanto.worker.checkpoint import load_tokenizer
from _qwquanto.worker.generation import Bench
from _qwquanto.worker.loading import load_model, make_meta_model
from _qwquanto.worker.measure import tokenize
from _qwquanto.worker.quality import measure_quality, plan_quality, reference_file


def test_reference_rows(tmp_path):
    rows = torch.randn(3, 1000)
    with reference_file(tmp_path, "wb") as file:
        for row in rows:
            file.write(row.numpy())
    with reference_file(tmp_path, "rb") as file:
        for row in rows:
            assert torch.equal(torch.frombuffer(bytearray(file.read(4000)), dtype=torch.float32), row)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "logprobs.f32").symlink_to("/dev/full")

    def write():
        with reference_file(tmp_path, "wb") as file:
            for _ in range(10):
                file.write(torch.zeros(100_000).numpy())

    told = re.escape(f"cannot keep the reference answer in {tmp_path} (No space left on device): set TMPDIR")
    with pytest.raises(Failure, match=told):
        write()


GIVEN = {"question": QUESTION, "compare": ("none", "int4"), "dtype": "float32", "quality_tokens": 48}


@pytest.fixture(scope="module")
def models(tiny):
    """A loader of the tiny model's precisions, in float32."""
    made = {}

    def get(weights):
        if weights not in made:
            s = settings(model_name=tiny, weights=weights, **GIVEN)
            made[weights] = load_model(s, tiny, make_meta_model(s, tiny), ["cpu"])
        return made[weights]

    return get


@pytest.fixture
def judged(models, tiny, tmp_path):
    """Measures quality as the worker does: judged(weights, constant=value, ...) -> its Result."""

    def measured(weights=None, model=None, limit=4096, **constants):
        s = settings(model_name=tiny, weights=weights, **GIVEN | constants)
        model, tokenizer = model or models(weights), load_tokenizer(tiny, tiny, False)
        bench, r = Bench(s, model=model, tokenizer=tokenizer), Result(s)
        bench.prompt = tokenize(s, tokenizer, model.config)
        bench.positions_left = limit - bench.prompt.shape[1]
        bench.plans = plan_quality(s, tokenizer, limit)
        r.quality = measure_quality(bench, r, tmp_path)
        return r

    return measured


def log_probabilities(model, passage):
    """By one forward pass over a passage, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([passage.prompt + passage.tokens])).logits[0].double()
    return torch.log_softmax(logits[len(passage.prompt) - 1 : -1], -1)


def divergences(models, passage):
    p, r = (log_probabilities(models(weights), passage) for weights in (None, "int4"))
    return (p.exp() * (p - r)).sum(-1), p.argmax(-1) == r.argmax(-1)


def test_against_an_independent_float64_computation(judged, models):
    """KL and the same top token at every position of a forced decode, against full forward passes."""
    reference, int4 = judged(), judged("int4")
    assert reference.is_reference and reference.quality is None
    found = int4.quality
    for i in range(16):
        each = [divergences(models, one) for one in reference.passages if one.part == i]
        assert found.kl_positions[i] == pytest.approx(torch.cat([kl for kl, _ in each]).tolist(), rel=1e-2)
        assert found.same_positions[i] == torch.cat([same for _, same in each]).tolist()
    assert found.positions == 48 and {len(part) for part in found.kl_positions} == {3}
    means = [statistics.fmean(part) for part in found.kl_positions]
    assert found.kl_divergence == pytest.approx(statistics.fmean(means)) and found.kl_divergence > 1e-3
    assert found.kl_standard_error == pytest.approx(statistics.stdev(means) / 4)
    assert found.perplexity is None


def test_the_reference_is_sampled_from_all_tokens_whatever_its_generation_config(judged, models):
    plain = judged().passages
    for i in range(16):
        generator = torch.Generator().manual_seed(i)
        drawn = [
            torch.multinomial(row.exp(), 1, generator=generator).item()
            for passage in plain
            if passage.part == i
            for row in log_probabilities(models(None), passage).float()
        ]
        assert drawn == [token for one in plain if one.part == i for token in one.tokens]
    tokenizer = load_tokenizer(models(None).name_or_path, models(None).name_or_path, False)
    assert plain[0].prompt == tokenizer(QUESTION).input_ids


def test_processors_of_the_models_own_change_nothing(judged, models, tmp_path):
    first = judged().passages
    model = models(None)
    given = model.generation_config
    model.generation_config = type(given)(
        eos_token_id=0, repetition_penalty=9.0, top_k=1, suppress_tokens=list(range(1, 300))
    )
    try:
        (tmp_path / "reference.json").unlink()
        assert judged().passages == first
        assert model.generation_config.top_k == 1, "put back"
    finally:
        model.generation_config = given


def test_an_answer_that_ends_early_is_followed_by_another(judged, models):
    """Here every token ends one, as where a reference ends at once."""
    model = models(None)
    model.generation_config.eos_token_id, before = list(range(320)), model.generation_config.eos_token_id
    try:
        reference = judged()
    finally:
        model.generation_config.eos_token_id = before
    assert [len(one.tokens) for one in reference.passages] == [1] * 48
    assert [one.part for one in reference.passages] == sorted(list(range(16)) * 3)
    found = judged("int4").quality
    assert found.positions == 48 and found.greedy_tokens == 1
    for part in found.kl_positions:
        assert len(set(part)) == 1, "the same place three times"
    first = divergences(models, reference.passages[0])[0]
    assert found.kl_positions[0] == pytest.approx([first.item()] * 3, rel=1e-2)


def test_each_prompt_has_its_part_of_the_time(judged):
    reference = judged(max_seconds=1e-9)
    assert [one.part for one in reference.passages] == list(range(16))
    assert {len(one.tokens) for one in reference.passages} == {1}


@pytest.mark.parametrize(("tokens", "parts", "each"), [(1, 1, 1), (5, 5, 1), (31, 16, 1), (32, 16, 2)])
def test_few_tokens_are_shared_alike(judged, tokens, parts, each):
    judged(quality_tokens=tokens)
    found = judged("int4", quality_tokens=tokens).quality
    assert [len(part) for part in found.kl_positions] == [each] * parts and found.positions == parts * each
    assert (found.kl_standard_error is None) == (parts == 1) == (answer_quality(result(quality=found)) == "–")


def test_a_model_of_64_positions(judged, tiny):
    plans = plan_quality(settings(**GIVEN | {"quality_tokens": 320}), load_tokenizer(tiny, tiny, False), 64)
    assert all(0 < plan.places <= 20 and len(plan.prompt) + plan.places <= 64 for plan in plans)
    assert {plan.places for plan in plans} > {20} and len(plans) > 8
    reference = judged(quality_tokens=320, limit=64)
    assert len(reference.passages[0].prompt + reference.passages[0].tokens) <= 64
    assert judged("int4", quality_tokens=320, limit=64).quality.positions == sum(
        len(one.tokens) for one in reference.passages
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_model_is_called_broken(judged, models, tiny, bad):
    judged()
    s = settings(model_name=tiny, weights="int4", **GIVEN)
    broken = load_model(s, tiny, make_meta_model(s, tiny), ["cpu"])
    broken.model.norm.weight.data[3] = bad
    r = judged("int4", broken)
    assert math.isfinite(r.quality.kl_divergence) and answer_quality(r) == "broken"
    assert grave_warnings(r)[0].startswith("BREAKS THIS MODEL")
    to_json(Benchmark([r]))


def test_a_reference_that_answers_nan_is_none(judged, tiny, tmp_path):
    s = settings(model_name=tiny, **GIVEN | {"weights": None})
    broken = load_model(s, tiny, make_meta_model(s, tiny), ["cpu"])
    broken.model.norm.weight.data[3] = math.nan
    with pytest.raises(Failure, match="answers NaN"):
        judged(None, broken)
    assert not (tmp_path / "reference.json").exists()
    assert judged("int4").is_reference, "the next one is"


def test_the_greedy_answer_is_compared_token_by_token(judged, models, monkeypatch):
    reference, int4 = judged(), judged("int4")
    model, ids = models(None), torch.tensor([reference.passages[0].prompt])
    wanted, found = (
        m.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        for m in (model, models("int4"))
    )
    same = next(
        (i for i, pair in enumerate(zip(wanted, found, strict=False)) if len(set(pair)) > 1), len(wanted)
    )
    assert int4.quality.same_greedy_tokens == same and int4.quality.greedy_tokens == len(wanted) > 20
    assert "determinant" in reference.greedy_answer


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("The determinant of a matrix is a number. 行列式 " * 5, encoding="utf-8")
    return str(file)


def test_a_text_of_the_users_is_forced_on_all(judged, models, tiny, text):
    options = {"quality_text": text, "quality_tokens": 100}
    (passage,), found = judged(**options).passages, judged("int4", **options).quality
    ids = load_tokenizer(tiny, tiny, False)(Path(text).read_text(encoding="utf-8")).input_ids
    assert passage.prompt + passage.tokens == ids[:101] and found.positions == 100
    kl, same = divergences(models, passage)
    assert [*itertools.chain(*found.kl_positions)] == pytest.approx(kl.tolist(), rel=1e-2, abs=1e-6)
    assert [*itertools.chain(*found.same_positions)] == same.tolist()
    assert {len(part) for part in found.kl_positions} == {8, 9} and len(found.kl_positions) == 12
    for weights, perplexity in ((None, found.reference_perplexity), ("int4", found.perplexity)):
        rows = log_probabilities(models(weights), passage)
        surprise = -rows[range(100), passage.tokens].mean()
        assert perplexity == pytest.approx(surprise.exp().item(), rel=1e-3)


def test_a_text_that_cannot_be_judged_is_refused_before_loading(tiny, text, tmp_path):
    tokenizer, given = load_tokenizer(tiny, tiny, False), settings(**GIVEN | {"quality_text": text})
    with pytest.raises(Failure, match="49 positions, the model has 40: lower QUALITY_TOKENS"):
        plan_quality(given, tokenizer, 40)
    with pytest.raises(
        Failure, match="20 of them to judge: at least 32 are needed, and QUALITY_TOKENS as high"
    ):
        plan_quality(replace(given, quality_tokens=19), tokenizer, 4096)
    (tmp_path / "mine.txt").write_text("Too short.")
    with pytest.raises(Failure, match="at least 32 are needed"):
        plan_quality(given, tokenizer, 4096)


def test_prompts_are_a_users_turns_under_chat(tiny):
    tokenizer = load_tokenizer(tiny, tiny, False)
    tokenizer.chat_template = "{% for m in messages %}U {{ m['content'] }} A{% endfor %}"
    plain, chat = (plan_quality(settings(**GIVEN, chat=c), tokenizer, 4096) for c in (False, True))
    assert [tokenizer.decode(plan.prompt) for plan in chat] == [
        f"U {tokenizer.decode(plan.prompt)} A" for plan in plain
    ]


def test_nothing_is_planned_where_nothing_is_judged(tiny):
    tokenizer = load_tokenizer(tiny, tiny, False)
    for off in ({"compare": ()}, {"quality_tokens": 0}, {"random_weights": True}):
        assert plan_quality(settings(**GIVEN | off), tokenizer, 4096) == []


def test_progress_goes_on_from_prompt_to_prompt(judged, monkeypatch):
    shown = []
    monkeypatch.setattr(generation, "status", lambda text, fraction=None: shown.append((text, fraction)))
    judged(), judged("int4")
    for title in ("the reference's text, ", "quality on the reference's text, "):
        fractions = [fraction for text, fraction in shown if text.startswith(title)]
        assert fractions == sorted(fractions) and len(fractions) >= 16 and 15 / 16 < fractions[-1] <= 1
