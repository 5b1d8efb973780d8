"""The report's tables of answers: how far from the reference's, and the greedy ones themselves. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _qwquanto.console import escape, table
from _qwquanto.results import Quality, Result, reference_of
from _qwquanto.stats import KL_BROKEN, KL_KEPT, answer_quality
from _qwquanto.text import format_3g, kl_text, plural, row_label


def comparison_quality(results: list[Result]) -> list[Any]:
    """How far each precision's answers are from the reference's."""
    colours = {"kept": "green", "changed": "yellow", "broken": "bold red", "reference": "dim", "–": "dim"}
    judged = [r.quality for r in results if r.quality]
    if not judged:
        return []
    rows, perplexity = [], judged[0].reference_perplexity
    for r in results:
        q, said = r.quality, "reference" if r.is_reference else answer_quality(r)
        share = f"{100 * q.same_top_token:.0f}" if q else "–"
        share += f" ({100 * q.low:.0f}–{100 * q.high:.0f})" if q and None not in (q.low, q.high) else ""
        worst = format_3g(q and q.kl_p99)
        if perplexity is not None:
            worst = format_3g(perplexity if r.is_reference else q and q.perplexity)
        answers = f"[{colours.get(said, 'yellow')}]{said}[/]"
        rows.append([row_label(r), kl_text(q), worst, share, answers])
    third = "KL p99" if perplexity is None else "perplexity"
    columns = ("weights", "KL nats", third, "same top token %", "answers")
    limits = f"This script's limits: kept up to a KL of {KL_KEPT}, changed up to {KL_BROKEN}, broken above."
    limits += " KL p99: 99 % of the tokens have a smaller KL." * (perplexity is None)
    return [*table(quality_title(results, judged), columns, rows), limits, *compiled_quality(results), ""]


def quality_title(results: list[Result], judged: list[Quality]) -> str:
    """Whose answers are held against whose, and along what text."""
    of, tokens = results[0].settings.quality_text, plural(max(q.positions for q in judged), "token")
    title = f"Answers against {reference_of(results)}'s, {tokens}"
    title += f" of {escape(Path(of).name)}" if of else f" of {plural(len(judged[0].kl_positions), 'prompt')}"
    title += ", KL ± s.e."
    if not any(r.is_reference and r.name == "none" for r in results):
        title += ", the most precise one that ran"
    return title


def compiled_quality(results: list[Result]) -> list[str]:
    """KL of the compiled steps; the reference's own is the floor."""
    steps = [(r, r.compiled.quality) for r in results if r.compiled and r.compiled.quality]
    each = ", ".join(f"{r.label} {kl_text(q)}" for r, q in steps if not r.is_reference)
    lines = [f"KL of the compiled step's answers: {each}."] if each else []
    for r, q in steps:
        if r.is_reference:
            both = f"{r.label} compiled against {r.label} eager"
            lines.append(f"The floor: KL {kl_text(q)} of {both}, which is rounding.")
    return lines


def answers(results: list[Result]) -> list[Any]:
    """The beginning of each precision's greedy answer or, where there is none, of its first timed one."""
    greedy, rows = any(r.greedy_answer for r in results), []
    most = 200 if len(results) > 1 else 400
    for r in results:
        text = r.greedy_answer if greedy else r.timed_runs[0].text if r.timed_runs else None
        text = " ".join((text or "").split()).rstrip("\ufffd")  # half a character, cut by the end
        if text or (greedy and r.greedy_answer is not None):
            rows.append([r.label, *[same_answer(r)] * greedy, escape(text[:most] + "…" * (len(text) > most))])
    if not rows:
        return []
    if greedy:
        columns = ("weights", f"as {reference_of(results)}'s for", "answer")
        return table("Greedy answers to the question", columns, rows, left=3)
    sampled = len(results) > 1 and results[0].settings.do_sample
    title = "The first answers begin" + " (sampled: each differs in wording)" * sampled
    return table(title, ("weights", "answer"), rows, left=2)


def same_answer(r: Result) -> str:
    """How long a greedy answer is the reference's: "41 of 64 tokens"."""
    if not r.quality or r.quality.same_greedy_tokens is None:
        return "–"
    return f"{r.quality.same_greedy_tokens} of {plural(r.quality.greedy_tokens, 'token')}"
