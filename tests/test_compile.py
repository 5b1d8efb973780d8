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
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
import torch
from torch._dynamo.utils import counters
import qwquanto as q

device, folder, lengths = sys.argv[1], sys.argv[2], dict(pair.split("=") for pair in sys.argv[3:])
if device == "cpu":  # recording CUDA graphs runs the step there instead
    torch.cuda.CUDAGraph, torch.cuda.graph = SimpleNamespace, lambda graph, pool: nullcontext()
    torch.cuda.graph_pool_handle = lambda: None
compilable = q.compilable

for weights, length in lengths.items():
    torch._dynamo.reset()
    counters.clear()
    length, seen = int(length), []
    s = replace(q.Settings(), model_name=folder, weights=None if weights == "none" else weights, compile=True)
    model = q.load(s, folder, q.skeleton(s, folder), [device])
    prompt = torch.arange(40, 50, device=device)[None]
    rig = q.Rig(model, None, prompt, length, 1000, True, [device], {})

    def logits(rig):
        kept = []
        def keep(ids, scores):
            kept.append(scores[0].clone())
            if len(kept) <= len(forced):
                scores = torch.full_like(scores, -torch.inf)
                scores[0, forced[len(kept) - 1]] = 0
            return scores
        clock = q.Clock([device], 1e9, 0)
        options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        q.generate(rig, prompt, clock, logits_processor=[keep], **options)
        return torch.stack(kept)[:, 1:]  # without the end token, which min_new_tokens forbids

    forced = []
    eager = logits(rig)
    forced = (eager.argmax(-1) + 1).tolist()
    if device == "cpu":
        q.compilable = lambda *a: seen.append(compilable(*a)) or seen[0]
    compiled = q.compile_decode(s, rig, lambda *_, **__: None)
    got = logits(rig)
    if device == "cpu":
        seen[0][1]()
    top = eager.topk(2).values
    clear = top[:, 0] - top[:, 1] > 0.03 * top[:, 0].abs()  # several times the rounding of bfloat16
    agree = (got.argmax(-1) == eager.argmax(-1))[clear].all().item()
    error = ((got - eager).norm() / eager.norm()).item()
    print(weights, compiled.graphs, q.graphs_compiled(), agree, clear.any().item(), error < 0.02, error, flush=True)
"""


@functools.cache
def compare_logits(folder, device="cpu"):
    """Eager against compiled logits of each precision on a device, in a process of its own; two windows for int8."""
    lengths = [f"{weights}={280 if weights == 'int8' else 40}" for weights in q.PRECISIONS]
    done = subprocess.run(
        [sys.executable, "-c", COMPARE_LOGITS, device, folder, *lengths],
        capture_output=True, encoding="utf-8", check=False, cwd=Path(q.__file__).parent, timeout=600,
    )  # fmt: skip
    told = [line.split() for line in done.stdout.splitlines()]
    return {weights: rest for weights, *rest in told}, done.stderr[-3000:]


@pytest.mark.parametrize("weights", q.PRECISIONS)
def test_compiled_logits_are_quantos(tiny, weights):
    """The same top token wherever it is clear, differences within bf16 rounding; one graph serves all windows."""
    found, err = compare_logits(tiny)
    assert weights in found, err
    graphs, later, agree, clear, close, error = found[weights]
    assert (graphs, later) == ("1", "1")
    assert (agree, clear, close) == ("True", "True", "True"), error


def test_a_compiled_run_says_what_was_compiled(script, tiny):
    from conftest import ANSWER, QUESTION

    ended = script(model_name=tiny, question=QUESTION, compile=True, max_length=64, do_sample=False)
    assert ended.code == 0, ended.err
    told = ended.results[0]
    assert told["compiled"]["graphs"] == 1 and told["compiled"]["recompilations"] == 0
    assert told["runs"][0]["text"] == ANSWER and "1 graph, 0 recompilations" in ended.out


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
    monkeypatch.setattr(q, "compilable", lambda model, longest: ({}, None))
    monkeypatch.setattr(q, "run_once", lambda *_, **__: None)
    monkeypatch.setattr(q, "graphs_compiled", lambda: 0)
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    rig = q.Rig(model, None, torch.ones(1, 3), 5, 5, False, ["cpu"], {})
    with pytest.raises(q.Failure, match="compiled nothing"):
        q.compile_decode(q.Settings(), rig, lambda *_, **__: None)


def test_float8_is_read_bit_by_bit_where_the_hardware_cannot():
    from optimum.quanto import QLinear, qfloat8

    linear = QLinear.from_module(torch.nn.Linear(256, 128, dtype=torch.bfloat16), weights=qfloat8)
    linear.freeze()
    layer = q.plain_linear()(linear)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    layer.data = numbers[~numbers.float().isnan()]
    layer.emulated = True
    assert torch.equal(layer.floats(), layer.data.float())


def test_unknown_attention_is_refused():
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(q.Failure, match="softcap"):
        q.window_attention(None, x, x, x, torch.ones(1, 1, 1, 8, dtype=torch.bool), softcap=30.0)


def test_large_scores_in_float16_stay_finite():
    """Qwen2's queries and keys make products beyond float16's range before they are scaled."""
    torch.manual_seed(0)
    query, key, value = (300 * torch.randn(1, heads, n, 128) for heads, n in ((4, 1), (2, 8), (2, 8)))
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    halves = [t.half() for t in (query, key, value)]
    assert (halves[0] @ halves[1].repeat_interleave(2, 1).transpose(2, 3)).isinf().any()
    found, _ = q.window_attention(None, *halves, mask, scaling=128**-0.5)
    exact = [t.double() for t in halves]
    wanted = torch.nn.functional.scaled_dot_product_attention(*exact, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(found.double(), wanted, rtol=1e-2)


def test_a_model_with_attention_of_its_own_is_refused(tiny):
    s = replace(q.Settings(), model_name=tiny, weights=None)
    model = q.load(s, tiny, q.skeleton(s, tiny), ["cpu"])
    model._supports_attention_backend = False
    with pytest.raises(q.Failure, match="attention"):
        q.compilable(model, 10)


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
