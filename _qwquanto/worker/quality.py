"""KL and agreement along the reference's answer, on the path that is timed. torch and numpy."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from _qwquanto.channel import Failure
from _qwquanto.results import Quality, Result
from _qwquanto.stats import percentile, wilson
from _qwquanto.worker.generation import Bench, generate


@contextlib.contextmanager
def reference_file(folder: Path, mode: str) -> Iterator[BinaryIO]:
    """The file of the reference's log probabilities, a row of float32 a position. Raises Failure."""
    # ordinary writes: on a full disk those of a memory map end the process by SIGBUS
    try:
        with open(folder / "logprobs.f32", mode) as file:
            yield file
    except OSError as error:
        what = f"cannot keep the reference answer in {folder} ({error.strerror or error})"
        raise Failure(f"{what}: set TMPDIR to a roomier folder") from error


def measure_quality(bench: Bench, result: Result, folder: Path) -> Quality | None:
    """The first model leaves its greedy answer in `folder`, as the reference; all others are judged on it.

    On the path that is timed: a logits processor forces the reference's tokens one by one through
    generate()'s own decode step. Each position is log-softmaxed in float32 as it comes and the reference's
    rows stay on disk, so a large vocabulary costs little memory.
    """
    s, tokens_file = bench.settings, folder / "tokens.json"
    is_reference = not tokens_file.exists()
    known = {} if is_reference else json.loads(tokens_file.read_text())
    positions = len(known["tokens"]) if known else min(s.quality_tokens, bench.positions_left)
    kl, same = [], []

    def keep_or_force(ids: Any, scores: Any) -> Any:
        # a broken model's NaN must not pass unseen, and its infinities must not make another
        q = torch.log_softmax(scores[0].float().nan_to_num(0, 1e4, -1e4), -1)
        if is_reference:
            q.cpu().numpy().tofile(rows)
            return scores
        p = torch.from_numpy(np.fromfile(rows, np.float32, len(q))).to(q.device)
        kl.append((p.exp() * (p - q)).sum().item())
        same.append((p.argmax() == q.argmax()).item())
        forced = torch.full_like(scores, -math.inf)
        forced[0, known["tokens"][len(kl) - 1]] = 0
        return forced

    title = "the reference answer" if is_reference else "quality on the reference answer"
    timeout_s = s.max_seconds if is_reference else math.inf  # a short reference is equally short for all
    options = {"max_new_tokens": positions, "do_sample": False, "repetition_penalty": 1.0}
    with reference_file(folder, "wb" if is_reference else "rb") as rows:
        new, _, _ = generate(bench, title, timeout_s, logits_processor=[keep_or_force], **options)
        if is_reference:  # its tokens last, and atomically: with them there is a complete reference
            part = folder / "tokens.part"
            part.write_text(json.dumps({"name": result.label, "tokens": new}))
            os.replace(part, tokens_file)
            result.is_reference = True
            return None
    error = statistics.stdev(kl) / math.sqrt(len(kl)) if len(kl) > 1 else None
    divergence = statistics.fmean(kl), error, percentile(kl, 99)
    agreement = statistics.fmean(same), *wilson(sum(same), len(same))
    return Quality(known["name"], len(kl), *divergence, *agreement)
