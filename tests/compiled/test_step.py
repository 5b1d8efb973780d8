"""The compiled decode step on a CPU: Quanto's results, generate()'s ways."""

import types

import pytest
import torch
import transformers
from models import PRECISIONS, beginning, compile_and_compare, trained

from _qwquanto.channel import Failure
from _qwquanto.compiled.prepare import SCRIPT_STEP, compile_decode
from _qwquanto.compiled.step import DecodeStep, bucketed_attention, draw_token

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("weights", PRECISIONS)
def test_compiled_logits_are_quantos(tiny, weights):
    """Four graphs, of layers, norm, positions and output, serve all layers and buckets."""
    done = compile_and_compare(trained(tiny, weights), *((270, 300) if weights == "int8" else (20, 64)))
    assert (done.way, done.graphs) == (SCRIPT_STEP, 4)


def test_generate_gives_what_it_gives_uncompiled(tiny):
    """An end token, a stopping criterion, a streamer, scores; and tensors where no dictionary is wanted."""

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, ids = trained(tiny, "int8"), beginning(tiny, 12)
    greedy = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    answer = model.generate(ids, **greedy)[0, 12:].tolist()
    asked = [
        {"eos_token_id": answer[7]},
        {"stopping_criteria": [lambda tokens, scores: tokens.shape[1] >= 20]},
        {
            "return_dict_in_generate": True,
            "output_scores": True,
            "output_logits": True,
            "repetition_penalty": 1.5,
        },
    ]
    wanted = [model.generate(ids, **greedy, **more) for more in asked]
    options = compile_decode(model, max_tokens=64)
    found = [model.generate(ids, **greedy, **more, **options) for more in asked]
    assert torch.equal(found[0], wanted[0]) and found[0].shape[1] < 12 + 30 and found[0][0, -1] == answer[7]
    assert torch.equal(found[1], wanted[1]) and found[1].shape[1] == 20
    assert torch.equal(found[2].sequences, wanted[2].sequences)
    for kind in ("scores", "logits"):
        both = [torch.cat(getattr(one[2], kind)) for one in (found, wanted)]
        assert both[0].shape == (30, 320) and (both[0] - both[1]).norm() / both[1].norm() < 0.02
    streamer = Streamer()
    model.generate(ids, **greedy, streamer=streamer, **options)
    assert streamer.ended and streamer.tokens == ids[0].tolist() + answer
    assert type(model).__name__ == "Qwen2ForCausalLM" and isinstance(model, transformers.Qwen2ForCausalLM)


def test_tokens_are_drawn_by_their_probability():
    """Of all, and of the best three: frequencies within four standard deviations; the others never."""
    torch.manual_seed(0)
    scores, times = torch.tensor([[0.0, 3.0, -2.0, 2.5, 1.0]]), 4000
    for top_k, allowed in ((None, [0, 1, 2, 3, 4]), (3, [1, 3, 4]), (9, [0, 1, 2, 3, 4])):
        probabilities = torch.zeros(5)
        probabilities[allowed] = scores[0, allowed].softmax(-1)
        drawn = torch.cat([draw_token(scores, True, top_k) for _ in range(times)])
        counts = torch.bincount(drawn.flatten(), minlength=5)
        spread = (times * probabilities * (1 - probabilities)).sqrt()
        assert ((counts - times * probabilities).abs() <= 4 * spread).all(), (top_k, counts)
    assert draw_token(scores, False, None).tolist() == [[1]]


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sliding_window", "position_bias"])
def test_unknown_attention_is_refused(name):
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(Failure, match=name):
        bucketed_attention(None, x, x, x, torch.ones(1, 1, 1, 8, dtype=torch.bool), **{name: 30.0})


def test_large_scores_in_float16_stay_finite():
    """Qwen2's queries and keys make products beyond float16's range before they are scaled."""
    torch.manual_seed(0)
    query, key, value = (300 * torch.randn(1, heads, n, 128) for heads, n in ((4, 1), (2, 8), (2, 8)))
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    halves = [t.half() for t in (query, key, value)]
    assert (halves[0] @ halves[1].repeat_interleave(2, 1).transpose(2, 3)).isinf().any()
    found, _ = bucketed_attention(None, *halves, mask, scaling=128**-0.5)
    exact = [t.double() for t in halves]
    wanted = torch.nn.functional.scaled_dot_product_attention(*exact, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(found.double(), wanted, rtol=1e-2)


def test_a_step_reads_the_smallest_bucket_that_holds_its_token():
    """Of every length; and its place is the last one: 257 tokens need place 256, which 256 places lack."""
    step = DecodeStep.__new__(DecodeStep)
    places = torch.arange(1024)
    step.graphs, step.buckets = {}, {size: places[:size] for size in (256, 512, 768, 1024)}
    step.token, step.position = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    asked = []
    step.step = lambda bucket: asked.append(len(bucket)) or types.SimpleNamespace(logits="eager")
    for length in range(1, 1025):
        assert step.decode(torch.tensor([[length]]), length) == "eager"
        assert (step.token.item(), step.position.item()) == (length, length - 1)
        assert asked[-1] - 256 < length <= asked[-1]
    replayed = []  # once captured, the graph of that same bucket
    for size in step.buckets:
        graph = types.SimpleNamespace(replay=lambda size=size: replayed.append(size))
        step.graphs[size] = graph, types.SimpleNamespace(logits=size)
    lengths = (1, 255, 256, 257, 512, 513, 1024)
    assert [step.decode(step.token, length) for length in lengths] == [256, 256, 256, 512, 512, 768, 1024]
    assert replayed == [256, 256, 256, 512, 512, 768, 1024] and len(asked) == 1024


def test_the_time_of_a_step_is_that_of_replays_in_a_row(monkeypatch):
    """Between two events, in whose middle nobody waits; the first replay is outside of them."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 2.0 * done.count("replay")  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    step = DecodeStep.__new__(DecodeStep)
    step.position = torch.zeros(1, dtype=torch.long)
    graph = types.SimpleNamespace(replay=lambda: done.append("replay"))
    step.graphs = {512: (graph, None)}
    assert step.replay_s(300, times=4) == 0.01 / 4
    assert done == ["replay", "record", *["replay"] * 4, "record", "wait"] and step.position.item() == 299


@pytest.mark.parametrize("length", [1, 255, 256, 257, 512])
def test_a_prompt_sees_itself_and_nothing_behind(length):
    step = DecodeStep.__new__(DecodeStep)
    step.places = torch.arange(768)
    mask = step.prompt_mask(torch.zeros(1, length, 1))
    assert mask.shape[:3] == (1, 1, length) and mask.shape[3] - 256 < length <= mask.shape[3]
    assert torch.equal(mask[0, 0].sum(-1), torch.arange(1, length + 1)) and mask[0, 0, :, 0].all()
