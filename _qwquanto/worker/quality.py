"""KL and agreement along the reference's text, on the path that is timed. torch and numpy."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers

from _qwquanto.channel import Failure, log
from _qwquanto.results import Passage, Quality, Result
from _qwquanto.settings import Settings
from _qwquanto.stats import mean_over_prompts, percentile, share_interval
from _qwquanto.text import plural
from _qwquanto.worker.checkpoint import token_ids
from _qwquanto.worker.generation import Bench, generate
from _qwquanto.worker.prompts import PROMPTS

QUALITY_PROMPTS = 16  # the user's question and PROMPTS
GREEDY_TOKENS = 64  # of the greedy answer, at most
LEAST_TEXT_TOKENS = 32  # of QUALITY_TEXT
LEAST_PART_TOKENS = 8  # of a part of QUALITY_TEXT: shorter ones depend on each other too much


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


@dataclass
class Plan:
    """Where quality is judged: `places` tokens after a prompt, the user's `text` or the reference's."""

    prompt: list[int]
    places: int
    text: list[int] | None = None


def plan_quality(s: Settings, tokenizer: Any, limit: float) -> list[Plan]:
    """Sixteen prompts with equal shares of QUALITY_TOKENS, the user's question first; or the user's text.

    `limit` positions has the model: a prompt's share may be shorter. Raises Failure for a text that is too
    short, or does not fit.
    """
    if not (s.compare and s.quality_tokens) or s.random_weights:
        return []
    if s.quality_text:
        return [plan_text(s, tokenizer, limit)]
    count = min(QUALITY_PROMPTS, s.quality_tokens)
    prompts = [token_ids(s, tokenizer, text)[0].tolist() for text in (s.question, *PROMPTS)][:count]
    plans = [Plan(ids, int(min(s.quality_tokens // count, limit - len(ids)))) for ids in prompts if ids]
    return [plan for plan in plans if plan.places > 0]


def plan_text(s: Settings, tokenizer: Any, limit: float) -> Plan:
    """QUALITY_TEXT's first QUALITY_TOKENS tokens, after one that is the prompt. Raises Failure."""
    ids = tokenizer(Path(s.quality_text).read_text(encoding="utf-8")).input_ids
    used = ids[: s.quality_tokens + 1]
    if len(used) < LEAST_TEXT_TOKENS:
        least = f"at least {LEAST_TEXT_TOKENS} are needed, and QUALITY_TOKENS as high"
        raise Failure(f"QUALITY_TEXT has {plural(len(ids), 'token')}, {len(used)} of them to judge: {least}")
    if len(used) > limit:
        raise Failure(
            f"QUALITY_TEXT takes {len(used)} positions, the model has {limit}: lower QUALITY_TOKENS"
        )
    if len(used) < len(ids):
        log(
            f"quality is judged on the first {len(used)} of QUALITY_TEXT's {len(ids)} tokens (QUALITY_TOKENS)"
        )
    return Plan(used[:1], len(used) - 1, used[1:])


def measure_quality(bench: Bench, result: Result, folder: Path) -> Quality | None:
    """The first model leaves its text in `folder`, as the reference; all others are held against it there.

    On the path that is timed: a logits processor forces the reference's tokens one by one through
    generate()'s own decode step. Each position is log-softmaxed in float32 as it comes and the reference's
    rows stay on disk, so a large vocabulary costs little memory.
    """
    known_file = folder / "reference.json"
    with plain_generation(bench.model):
        if not known_file.exists():
            write_reference(bench, result, known_file)
            return None
        known = json.loads(known_file.read_text())
        with reference_file(folder, "rb") as rows:
            quality = compare_with_reference(bench, known, rows)
        if not bench.compiled:
            greedy = greedy_answer(bench, result, len(known["greedy"]))
            pairs = zip(greedy, known["greedy"], strict=False)
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
            quality.same_greedy_tokens, quality.greedy_tokens = len(list(same)), len(known["greedy"])
    return quality


@contextlib.contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Within, generate() adds no processor of the model's own (repetition penalty ...): scores are raw."""
    own = model.generation_config
    model.generation_config = transformers.GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


def greedy_answer(bench: Bench, result: Result, most: int, timeout_s: float = math.inf) -> list[int]:
    """The tokens of the greedy answer to the user's question; its text goes into the Result."""
    options = {"max_new_tokens": most, "do_sample": False}
    tokens, _, _ = generate(bench, "the greedy answer", timeout_s, **options)
    text = bench.tokenizer.decode(tokens, skip_special_tokens=True) if bench.tokenizer else ""
    result.greedy_answer = text
    return tokens


def walk(
    bench: Bench,
    prompt: list[int],
    places: int,
    choose: Callable[[int, torch.Tensor], int],
    title: str,
    **options: Any,
) -> int:
    """Lead generate() along a text by the tokens that `choose` names; the number of places it came to.

    `choose` gets a place's number and the model's scores there. generate() decodes as in the timed runs, but
    a logits processor leaves it nothing to pick from but that token.
    """
    ids = torch.tensor([prompt], device=bench.prompt.device)

    def force(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = tokens.shape[1] - len(prompt)
        if place == places:  # on MPS generate() looks one place further, see there
            return scores
        forced = torch.full_like(scores, -math.inf)
        forced[0, choose(place, scores[0])] = 0
        return forced

    options |= {"max_new_tokens": places, "do_sample": False, "logits_processor": [force]}
    return len(generate(bench, title, prompt=ids, **options)[0])


def is_defined(scores: torch.Tensor) -> torch.Tensor:
    """Whether scores make probabilities: no NaN, and no infinity but -inf, which leaves a token out."""
    return (scores < math.inf).all() & (scores > -math.inf).any()


def log_probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Of all tokens, in float32. A broken model's NaN and infinities count as all tokens being alike."""
    known = scores.float().masked_fill(~is_defined(scores), 0)
    return torch.log_softmax(known, -1).clamp(min=-1e4)  # a KL must stay finite


def write_reference(bench: Bench, result: Result, known_file: Path) -> None:
    """Keep this model's text as the reference: what follows on the prompts, and its log-probabilities there.

    Each prompt has an equal part of MAX_SECONDS: a slow machine shortens all of them alike. The tokens are
    written last, and atomically: with them there is a complete reference.
    """
    s, passages = bench.settings, []
    most = int(min(GREEDY_TOKENS, s.quality_tokens, bench.positions_left))
    greedy = greedy_answer(bench, result, most, s.max_seconds / 4)
    begin = time.perf_counter()
    with reference_file(known_file.parent, "wb") as rows:
        for i in range(len(bench.plans)):
            until = begin + s.max_seconds * (i + 1) / len(bench.plans)
            passages += draw_passages(bench, i, rows, until)
    known = {"name": result.label, "passages": [dataclasses.asdict(p) for p in passages], "greedy": greedy}
    part = known_file.with_suffix(".part")
    part.write_text(json.dumps(known))
    os.replace(part, known_file)
    result.is_reference, result.passages = True, passages


def draw_passages(bench: Bench, number: int, rows: BinaryIO, until: float) -> list[Passage]:
    """What follows on a plan's prompt, with the reference's log-probabilities in `rows`; until some time.

    An answer that ends early is followed by another one to the same prompt.
    """
    plan, passages = bench.plans[number], []
    generator, left = torch.Generator().manual_seed(number), plan.places
    while left and (not passages or time.perf_counter() < until):
        timeout_s = max(1e-9, until - time.perf_counter())
        tokens = draw_passage(bench, number, left, generator, rows, timeout_s)
        passages.append(Passage(plan.prompt, tokens, number))
        left -= len(tokens)
    return passages


def draw_passage(
    bench: Bench, number: int, most: int, generator: torch.Generator, rows: BinaryIO, timeout_s: float
) -> list[int]:
    """The tokens of one answer, or of the user's text. Raises Failure for a reference that answers NaN.

    Sampled at T = 1 from all tokens, so that the mean of KL is that of whole answers, and on the CPU, where
    fixed seeds give the same text for any device's equal probabilities.
    """
    plan, tokens, ends = bench.plans[number], [], [rows.tell()]

    def choose(place: int, scores: torch.Tensor) -> int:
        if not is_defined(scores):
            raise Failure("this model answers NaN, so it is no reference: try another DTYPE")
        row = log_probabilities(scores).cpu()
        row.numpy().tofile(rows)
        ends.append(rows.tell())
        token = plan.text[place] if plan.text else torch.multinomial(row.exp(), 1, generator=generator).item()
        tokens.append(token)
        return token

    title = f"the reference's text, {number + 1} of {len(bench.plans)}"
    options = {"eos_token_id": None} if plan.text else {}
    options |= {"timeout_s": timeout_s, "part": (number, len(bench.plans))}
    done = walk(bench, plan.prompt, most, choose, title, **options)
    rows.seek(ends[done])  # on MPS one row more may have been written after the end
    return tokens[:done]


def compare_with_reference(bench: Bench, known: dict[str, Any], rows: BinaryIO) -> Quality:
    """This model at the places of the reference's passages, held against its rows there."""
    s, passages, found = bench.settings, [Passage(**plain) for plain in known["passages"]], {}
    for i, passage in enumerate(passages):
        figures = judge_passage(bench, passage, rows, (i, len(passages)))
        # of a text, up to sixteen parts stand for prompts
        parts = min(QUALITY_PROMPTS, len(figures) // LEAST_PART_TOKENS) if s.quality_text else 1
        for place, at in enumerate(figures):
            found.setdefault(passage.part + place * max(1, parts) // len(figures), []).append(at)
    kl, same = ([[at[i] for at in part] for part in found.values()] for i in (0, 1))
    every = [at for part in found.values() for at in part]
    divergence, error = mean_over_prompts(kl)
    perplexities = [perplexity_of(at[i] for at in every) if s.quality_text else None for i in (2, 3)]
    return Quality(
        reference=known["name"],
        positions=len(every),
        kl_divergence=divergence,
        kl_standard_error=error,
        kl_p99=percentile([at[0] for at in every], 99),
        same_top_token=mean_over_prompts(same)[0],
        low=share_interval(same)[0],
        high=share_interval(same)[1],
        kl_positions=kl,
        same_positions=[[bool(at) for at in part] for part in same],
        text_id=hashlib.sha256(json.dumps(known["passages"]).encode()).hexdigest()[:16],
        perplexity=perplexities[1],
        reference_perplexity=perplexities[0],
    )


def perplexity_of(log_probabilities: Iterable[float]) -> float:
    return math.exp(min(700.0, -statistics.fmean(log_probabilities)))  # e^710 is no float


def judge_passage(
    bench: Bench, passage: Passage, rows: BinaryIO, part: tuple[int, int]
) -> list[tuple[float, ...]]:
    """At each place: KL, whether the top token is the same, both log-probabilities of the token there."""
    figures = []

    def choose(place: int, scores: torch.Tensor) -> int:
        token, q = passage.tokens[place], log_probabilities(scores)
        p = torch.from_numpy(np.fromfile(rows, np.float32, len(q))).to(q.device)
        at = (p.exp() * (p - q)).sum(), p.argmax() == q.argmax(), p[token], q[token]
        figures.append(tuple(torch.stack([value.float() for value in at]).tolist()))
        return token

    title = f"quality on the reference's text, {part[0] + 1} of {part[1]}"
    walk(bench, passage.prompt, len(passage.tokens), choose, title, eos_token_id=None, part=part)
    return figures
