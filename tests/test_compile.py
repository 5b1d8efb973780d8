"""Compiled decode on the CPU: Quanto's results, one graph, no recompilation; and upstream's defects are still there."""

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qwquanto as q

COMPARE_LOGITS = """
import sys
from dataclasses import replace
import torch
import qwquanto as q

folder, weights, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
s = replace(q.Settings(), model_name=folder, weights=None if weights == "none" else weights, compile=True, device="cpu")
model = q.load(s, folder, q.skeleton(s, folder), ["cpu"])
prompt = torch.arange(40, 50)[None]
rig = q.Rig(model, None, prompt, length, 1000, True, ["cpu"], {})

def logits(rig):
    kept = []
    def keep(ids, scores):
        kept.append(scores[0].clone())
        if len(kept) <= len(forced):
            scores = torch.full_like(scores, -torch.inf)
            scores[0, forced[len(kept) - 1]] = 0
        return scores
    clock = q.Clock(lambda: None, 1e9, 0, lambda *_: None)
    q.generate(rig, prompt, clock, logits_processor=[keep], max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0)
    return torch.stack(kept)[:, 1:]  # without the end token, which min_new_tokens forbids

forced = []
eager = logits(rig)
forced = (eager.argmax(-1) + 1).tolist()
compiled = q.compile_decode(s, rig, lambda *_, **__: None)
got = logits(rig)
top = eager.topk(2).values
clear = top[:, 0] - top[:, 1] > 0.03 * top[:, 0].abs()  # several times the rounding of bfloat16
agree = (got.argmax(-1) == eager.argmax(-1))[clear].all().item()
error = ((got - eager).norm() / eager.norm()).item()
print(compiled.graphs, q.graphs_compiled(), agree, clear.any().item(), error < 0.02, error)
"""


@functools.cache
def compare_logits(folder, weights, length=40):
    """Eager against compiled logits of one precision, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", COMPARE_LOGITS, folder, weights, str(length)],
        capture_output=True, encoding="utf-8", check=False, cwd=Path(q.__file__).parent, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.parametrize("weights", q.PRECISIONS)
def test_compiled_logits_are_quantos(tiny, weights):
    """The same top token wherever it is clear, differences within bf16 rounding, one graph; over two windows."""
    length = 280 if weights == "int8" else 40
    graphs, later, agree, clear, close, error = compare_logits(tiny, weights, length)
    assert (graphs, later) == ("1", "1")
    assert (agree, clear, close) == ("True", "True", "True"), error


def test_a_compiled_run_says_what_was_compiled(script, tiny):
    from conftest import ANSWER, QUESTION

    ended = script(model_name=tiny, question=QUESTION, compile=True, max_length=64, do_sample=False)
    assert ended.code == 0, ended.err
    told = ended.results[0]
    assert told["compiled"]["graphs"] == 1 and told["compiled"]["recompilations"] == 0
    assert told["runs"][0]["text"] == ANSWER and "1 graph(s), 0 recompilations" in ended.out


def test_a_compiled_comparison_has_its_eager_pair(script, tiny):
    ended = script(
        model_name=tiny, compile=True, compare=("none", "int4"), compare_tokens=8, quality_tokens=20
    )
    assert ended.code == 0, ended.err
    for told in ended.results:
        assert len(told["eager_runs"]) == len(told["runs"]) == 2 and told["compiled"]["graphs"] == 1
    assert ended.results[1]["quality"]["positions"] > 0
    (line,) = [line for line in ended.out.splitlines() if line.startswith("| torch.compile")]
    assert "%" in line


def test_nothing_compiled_is_a_failure_and_no_figure(monkeypatch):
    monkeypatch.setattr(q, "compilable", lambda model, longest: {})
    monkeypatch.setattr(q, "run_once", lambda *_, **__: None)
    monkeypatch.setattr(q, "graphs_compiled", lambda: 0)
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    rig = q.Rig(model, None, torch.ones(1, 3), 5, 5, False, ["cpu"], {})
    with pytest.raises(q.Failure, match="compiled nothing"):
        q.compile_decode(q.Settings(), rig, lambda *_, **__: None)


def test_unknown_attention_is_refused():
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(q.Failure, match="softcap"):
        q.window_attention(None, x, x, x, torch.ones(1, 1, 1, 8, dtype=torch.bool), softcap=30.0)


def test_the_mean_window_that_a_decode_step_reads():
    assert q.mean_window(16, 100) == 256
    assert q.mean_window(254, 5) == (256 + 256 + 512 + 512) / 4


def test_upstream_still_refuses_to_compile_quanto(tiny):
    """Once this fails, `model.hf_quantizer = None` in `compilable` can go."""
    s = replace(q.Settings(), model_name=tiny)
    model = q.load(s, tiny, q.skeleton(s, tiny), ["cpu"])
    assert model.hf_quantizer.is_compileable is False


def test_upstream_documented_recipe_still_compiles_nothing(tiny):
    """Once this fails, the README's section on compiling must change: torch.compile(model).generate compiles now."""
    s = replace(q.Settings(), model_name=tiny, weights=None)
    model = q.load(s, tiny, q.skeleton(s, tiny), ["cpu"])
    before = q.graphs_compiled()
    torch.compile(model).generate(torch.tensor([[40, 41]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert q.graphs_compiled() == before
