"""KL on the reference's answer, and the file that holds it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from results import settings

from _qwquanto.channel import Failure
from _qwquanto.results import Result
from _qwquanto.worker.generation import Bench
from _qwquanto.worker.loading import load_model, make_meta_model
from _qwquanto.worker.quality import measure_quality, reference_file


def test_quality_against_an_independent_float64_computation(tiny, tmp_path):
    """KL and same top token of a forced decode, against one full forward pass in float64."""
    s = settings(model_name=tiny, quality_tokens=12, compare=("none", "int4"), dtype="float32")
    models, results, prompt = {}, {}, torch.tensor([[40, 41, 42, 43, 44]])
    for weights in (None, "int4"):
        mine = replace(s, weights=weights)
        models[weights] = load_model(mine, tiny, make_meta_model(mine, tiny), ["cpu"])
        bench, results[weights] = (
            Bench(mine, model=models[weights], prompt=prompt, positions_left=100),
            Result(mine),
        )
        results[weights].quality = measure_quality(bench, results[weights], tmp_path)
    answer = models[None].generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        at = slice(prompt.shape[1] - 1, answer.shape[1] - 1)
        logits = {w: m(answer).logits[0, at].double() for w, m in models.items()}
    p, r = (torch.log_softmax(logits[w], -1) for w in (None, "int4"))
    kl, quality = (p.exp() * (p - r)).sum(-1), results["int4"].quality
    assert results[None].is_reference and results[None].quality is None
    assert quality.positions == answer.shape[1] - prompt.shape[1]
    assert quality.kl_divergence == pytest.approx(kl.mean().item(), rel=1e-3)
    assert quality.kl_standard_error == pytest.approx(kl.std().item() / len(kl) ** 0.5, rel=1e-3)
    assert quality.kl_divergence > 1e-4
    assert quality.same_top_token == pytest.approx((p.argmax(-1) == r.argmax(-1)).double().mean().item())


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
