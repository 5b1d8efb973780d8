"""Which precision to take: the first line of a comparison. Pure.

The candidates are the unquantized model (bf16, say) and every precision that is certain to keep its answers;
where bf16 did not run, the reference, which is the most precise one that did, and what keeps its answers.
"Smallest" is by stored weights; within a percent of them the fastest.

| bf16 | speeds | take |
|---|---|---|
| was not measured, or did not run | | the smallest candidate |
| ran on other devices (spread over several) | not compared | the smallest candidate |
| ran | one candidate certainly decodes fastest | that one; where it is bf16, the smallest for less memory |
| ran | several may be the fastest | the smallest of those whose median is within a tenth of the fastest's |
| ran | as above, but bf16 took no more memory and may decode as fast, or is faster by 512+128 s | bf16 |
| ran, and nothing else keeps its answers | | bf16 |

A decode speed is certain where its 95 % interval excludes the others' (`speed_interval`). Speeds are eager,
as a program of yours has them; where those of the compiled step lead to another precision, it is named too.
Memory is what the program took of the devices, see `device_peak`.
"""

from __future__ import annotations

from collections.abc import Callable

from _qwquanto.fit import CARDS_GIB, context_text, context_that_fits, device_peak, memory_taken
from _qwquanto.results import Result, reference_of
from _qwquanto.settings import SHORT_DTYPES
from _qwquanto.stats import (
    KL_KEPT,
    SAME_SPEED_RATIO,
    answer_quality,
    decode_rate,
    is_about_one,
    kl_interval,
    saving,
    speed_interval,
)
from _qwquanto.text import format_3g, gib, interval_text, kl_text, percent

Interval = tuple[float, float] | None


def advice(results: list[Result], done: list[Result]) -> str:
    """What to take of those `done`, measured to their end, and why; empty where quality tells nothing."""
    if not any(r.quality for r in done):
        return ""
    base = next((r for r in done if r.name == "none"), None)
    kept = [r for r in done if r is not base and (answer_quality(r) == "kept" or r.is_reference)]
    if base and not kept:
        return f"{take(base)}: nothing smaller is certain to keep its answers."
    if not kept:
        return ""
    least = smallest(kept, eager_rate)
    if base is None:
        return without_base(results, least)
    if base.devices != least.devices:
        on = f"on {', '.join(least.devices)} {weights_text(least)}"
        where = f"{base.label} ran on {', '.join(base.devices)}, so speeds are not compared"
        return f"{take(least)}: it keeps the answers {on}; {where}."
    candidates = [base, *(r for r in kept if r.devices == base.devices)]
    worth = [r for r in candidates if r is base or is_worth_it(r, base)]
    best = smallest(fastest_of(worth, eager_rate, speed_interval), eager_rate)
    line = take_base(base, least) if best is base else take_smaller(best, base)
    if best is not base and least is not best:
        line += f" Smaller still: {least.label} {weights_text(least)}, {both_ways(least, base)}."
    return line + compiled_advice(best, candidates)


def take(r: Result) -> str:
    return f"[bold green]Take {r.label}[/]"


def eager_rate(r: Result) -> float:
    return decode_rate(r.runs)


def compiled_rate(r: Result) -> float:
    return decode_rate(r.compiled.runs)


def compiled_interval(r: Result, base: Result) -> Interval:
    """The 95 % interval of r's compiled decode rate over base's."""
    return speed_interval(r, base, compiled=True)


def smallest(candidates: list[Result], rate: Callable[[Result], float]) -> Result:
    """The smallest, or of those of its size the fastest; a percent of memory is no difference."""
    least = min(r.weight_bytes for r in candidates)
    return max((r for r in candidates if r.weight_bytes <= 1.01 * least), key=rate)


def fastest_of(
    candidates: list[Result], rate: Callable[[Result], float], interval: Callable[[Result, Result], Interval]
) -> list[Result]:
    """The fastest, and those that may be as fast.

    By their interval, with a median within a tenth of it; or without an interval, so that nothing is known.
    """
    fastest = max(candidates, key=rate)

    def may_be(r: Result) -> bool:
        known = interval(r, fastest)
        return known is None or (known[1] >= 1 and rate(r) * SAME_SPEED_RATIO >= rate(fastest))

    return [r for r in candidates if r is fastest or may_be(r)]


def may_equal(r: Result, fastest: Result) -> bool:
    """Whether a precision may be as fast as another one."""
    return (speed_interval(r, fastest) or (0, 1))[1] >= 1


def takes_less(r: Result, base: Result) -> bool:
    """Whether the program took less memory; of a CPU's processes, quantized ones often take more."""
    ours, theirs = device_peak(r), device_peak(base)
    return ours < theirs if ours and theirs else r.weight_bytes < base.weight_bytes


def question_s(r: Result) -> float | None:
    """Seconds for a prompt of 512 tokens and an answer of 128, eager, by the rates of both.

    Decoding is slower after a long prompt: by what was measured in turn, where it is known; faster it is by
    chance alone. A model that takes fewer tokens has no such prompt.
    """
    rate = (decode_rate(r.runs) or 0) * min(1.0, r.decode_after_prefill_ratio or 1.0)
    if not rate or not r.prefill_tokens_per_s or r.prefill_tokens != 512:
        return None
    return 512 / r.prefill_tokens_per_s + 127 / rate


def reads_slowly(r: Result, base: Result) -> bool:
    """Whether a long question takes longer than with the unquantized model, however fast the decoding."""
    ours, theirs = question_s(r), question_s(base)
    return bool(ours and theirs and ours > theirs)


def is_worth_it(r: Result, base: Result) -> bool:
    """Whether a quantized model brings anything: less memory, or speed that its prompts do not cost again."""
    return takes_less(r, base) or not (may_equal(base, r) or reads_slowly(r, base))


def memory_text(r: Result) -> str:
    return f"{gib(memory_taken(r) or r.weight_bytes)} GiB"


def weights_text(r: Result) -> str:
    return f"in {gib(r.weight_bytes)} GiB of weights ({percent(saving(r))} % saved)"


def both_ways(r: Result, base: Result) -> str:
    """ "decode 0.69 times, prompts 3.5 times bf16's speed"."""
    ratios = [f"decode {format_3g(eager_rate(r) / eager_rate(base))} times"]
    if r.prefill_tokens_per_s and base.prefill_tokens_per_s:
        ratios.append(f"prompts {format_3g(r.prefill_tokens_per_s / base.prefill_tokens_per_s)} times")
    return f"{', '.join(ratios)} {base.label}'s speed"


def take_base(base: Result, least: Result) -> str:
    """The unquantized model: it is faster, or the smaller one would bring nothing for certain."""
    total = sum(base.device_memory_bytes.values())
    fits = (
        f"{gib(memory_taken(base) or base.weight_bytes)} of {gib(total)} GiB" if total else memory_text(base)
    )
    if not may_equal(base, least):  # it decodes faster
        both = f"{format_3g(question_s(base))} s against {format_3g(question_s(least))}"
        why = f"and is faster than {least.label} where prompts are long (512 + 128 tokens: {both})"
    elif may_equal(least, base):
        spread = interval_text(speed_interval(least, base), format_3g).strip(" ()")
        why = f"and {least.label} is not certain to be faster" + f" ({spread} times)" * bool(spread)
    else:
        why = f"and is {format_3g(eager_rate(base) / eager_rate(least))} times as fast as {least.label}"
    line = f"{take(base)}: it fits ({fits}) {why}."
    if not takes_less(least, base):
        keeps = f"{least.label} keeps the answers too ({both_ways(least, base)})"
        return f"{line} {keeps}, but took no less memory: {memory_text(least)}."
    line += f" Where memory is short: {least.label} keeps the answers and took {memory_text(least)}"
    return f"{line}{room_text(least, base)}, {both_ways(least, base)}."


def room_text(r: Result, base: Result) -> str:
    """The smallest common card on which a precision has room for more context than the unquantized model."""
    for card in CARDS_GIB:
        ours, theirs = (context_that_fits(one, card * 2**30) for one in (r, base))
        if not ours or theirs is None or ours <= theirs:
            continue
        room, other = context_text(r, ours), context_text(base, theirs)
        if room != other:
            return f" (a card of {card} GB has room for {room} tokens with it, {other} with {base.label})"
    return ""


def take_smaller(best: Result, base: Result) -> str:
    """A quantized precision that is faster, or that may be as fast and takes less memory."""
    line = f"{take(best)}: it keeps the answers {weights_text(best)}, {both_ways(best, base)}"
    if may_equal(base, best):
        interval = speed_interval(best, base)
        unsure = "about as fast" if is_about_one(interval) else "which decodes faster is not certain"
        line += f"; {unsure}{interval_text(interval, format_3g)}"
    ours, theirs = device_peak(best), device_peak(base)
    if ours and theirs and ours >= theirs:
        how = "more" if ours > theirs else "no less"
        line += f". The program took {how} memory, {memory_text(best)} against {memory_text(base)}"
    return line + "."


def without_base(results: list[Result], least: Result) -> str:
    """The smallest that keeps the answers of the most precise one that ran, or that one itself."""
    failed = next((r for r in results if r.name == "none"), None)
    label = SHORT_DTYPES.get(least.dtype, "the unquantized model")
    needed, total = least.unquantized_bytes, sum(least.device_memory_bytes.values())
    why = f"{label} was not measured"
    if failed:
        why = f"{label} did not run here"
        if needed and total and needed > total:
            why = f"{label} does not fit ({gib(needed)} GiB of weights in {gib(total)} GiB)"
    figures = f"{gib(least.weight_bytes)} GiB of weights, {percent(saving(least))} % saved, decode"
    figures = f"({figures} {format_3g(eager_rate(least))} tokens/s)"
    if least.is_reference:
        rest = (
            f"It is the most precise one that ran {figures}; nothing smaller is certain to keep its answers."
        )
    else:
        rest = f"It keeps {reference_of(results)}'s answers {figures}."
    return f"{take(least)}: {why}. {rest}{beside(results, least)}"


def beside(results: list[Result], least: Result) -> str:
    """What else there is where the unquantized model is not: as small a one, and smaller ones for less."""
    alike, smaller = [], []
    for r in results:
        rate = decode_rate(r.runs)
        if r is least or not (r.eager_complete and r.weight_bytes and rate):
            continue
        if r.weight_bytes < 0.99 * least.weight_bytes and answer_quality(r) in ("kept or changed", "changed"):
            smaller.append(f"{r.label} ({gib(r.weight_bytes)} GiB, KL {kl_text(r.quality)})")
        elif r.weight_bytes <= 1.01 * least.weight_bytes and (r.is_reference or answer_quality(r) == "kept"):
            alike.append(f"{r.label}, {format_3g(rate)} tokens/s")
    line = f" Equally small: {'; '.join(alike)}." if alike else ""
    return line + (f" Smaller, but with changed answers: {'; '.join(smaller)}." if smaller else "")


def compiled_advice(best: Result, candidates: list[Result]) -> str:
    """What to take with this script's compiled step, where that is another precision."""
    timed = [r for r in candidates if r.compiled and decode_rate(r.compiled.runs)]
    timed = [r for r in timed if not (q := r.compiled.quality) or kl_interval(q)[0] <= KL_KEPT]
    if best not in timed:
        return ""
    fastest = fastest_of(timed, compiled_rate, compiled_interval)
    other = smallest(fastest, compiled_rate)
    if best in fastest and best.weight_bytes <= 1.01 * other.weight_bytes:  # perhaps as fast, and no larger
        return ""
    if compiled_interval(best, other) is None:
        return ""
    rates = f"{format_3g(compiled_rate(other))} tokens/s, {best.label} {format_3g(compiled_rate(best))}"
    return f" In this script's compiled step take {other.label}: {rates}."
