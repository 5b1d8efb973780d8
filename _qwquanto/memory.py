"""The report's tables of memory, and the cards that would hold the model. Pure."""

from __future__ import annotations

from typing import Any

from _qwquanto.console import bars, table
from _qwquanto.fit import CARDS_GIB, context_text, context_that_fits, device_peak, tensor_peak
from _qwquanto.results import Result
from _qwquanto.stats import saving
from _qwquanto.text import format_3g, gib, mib, percent, plural, row_label


def memory_table(r: Result) -> list[Any]:
    """Every phase of memory, a row each kind; and the weights in two sentences."""
    phases = ("before load", "after load", "peak of load", "peak of runs")
    named = lambda name: name.replace("used", "used by all").replace("rss", "process RSS")
    sizes = lambda name: [gib(r.memory.get(phase, {}).get(name)) for phase in phases]
    rows = [[named(name), *sizes(name)] for name in r.memory.get(phases[0], ())]
    parts = table("Memory", ("GiB", *phases), rows) if rows else []
    if r.weight_bytes is None:
        return parts
    kinds = ", ".join(f"{count} {kind}" for kind, count in r.weight_types.items())
    quantized = f"Quantized: {r.quantized_layers} of {r.linear_layers} linear layers"
    quantized += f" ({kinds})" if kinds else ""
    if r.skipped_layers:
        quantized += f"; {plural(r.skipped_layers, 'layer')} with a forward of its own left alone"
    stored = f"[bold]Weights: {r.weight_bytes / 1e6:,.2f} MB stored[/]"
    stored += f"; unquantized {r.unquantized_bytes / 1e6:,.2f} MB: {percent(saving(r))} % saved"
    peaks = [f"{named(name)} {gib(size)}" for name, size in r.memory.get("peak of compiled runs", {}).items()]
    step = [f"Peak in the compiled step: {', '.join(peaks)} GiB."] if peaks else []
    lines = [f"{stored}. Loaded in {format_3g(r.load_s)} s.", quantized + "."]
    lines += cache_line([r]) + fit_line([r])
    return [*parts, *step, *lines, ""]


def comparison_memory(results: list[Result]) -> list[Any]:
    """Stored weights, and the runs' peak by the device's count and in tensors."""
    sizes = [r.weight_bytes for r in results]
    peaks = [device_peak(r) for r in results]
    tensors = [tensor_peak(r) for r in results]
    rows = []
    for i, (r, cell) in enumerate(zip(results, bars(sizes, [*map(gib, sizes)]), strict=True)):
        row = [row_label(r), cell, percent(saving(r))]
        row += [gib(peaks[i])] * any(peaks) + [gib(tensors[i])] * any(tensors)
        rows.append([*row, format_3g(r.load_s)])
    columns = ["weights", "stored", "saved %", *["peak"] * any(peaks), *["tensors"] * any(tensors)]
    on_cpu = all(r.devices == ["cpu"] for r in results if r.memory)
    what = "the whole process (RSS)" if on_cpu else "what the program took of the device"
    title = "Memory in GiB" + f"; peak: {what} in eager runs" * any(peaks)
    title += "; tensors: torch's part of it" * (any(peaks) and any(tensors))
    parts = table(title, [*columns, "load s"], rows)
    lines = cache_line(results) + fit_line(results) + process_lines(results)
    return [*parts, *lines, *[""] * bool(lines)]


def fit_on(card: int, results: list[Result]) -> str | None:
    """ "bf16 9,000; int8, int4 all 32,768": what a card of so many GiB holds; None if unknown."""
    groups: dict[str, list[str]] = {}
    for r in results:
        tokens = context_that_fits(r, card * 2**30)
        if tokens is None:
            continue
        groups.setdefault(context_text(r, tokens), []).append(r.label)
    return "; ".join(f"{', '.join(labels)} {text}" for text, labels in groups.items()) or None


def fit_line(results: list[Result]) -> list[str]:
    """Which cards hold which precision up to which context; one line, and none where that is unknown.

    Cards that hold the same share a place.
    """
    cards: dict[str, list[str]] = {}
    for card in CARDS_GIB:
        if text := fit_on(card, results):
            cards.setdefault(text, []).append(f"{card}")
    parts = [f"{', '.join(sizes)} GB: {text}" for text, sizes in cards.items()]
    title = "Tokens of context that a card has room for (computed)"
    return [f"{title}. {'. '.join(parts)}."] if parts else []


def cache_line(results: list[Result]) -> list[str]:
    """Bytes of the KV cache; Quanto's weights leave it as it is, so that one figure is all precisions'."""
    sizes = {mib(1000 * r.kv_bytes_per_token): None for r in results if r.kv_bytes_per_token}
    return [f"KV cache: {' or '.join(sizes)} MiB per 1,000 tokens of context."] if sizes else []


def process_lines(results: list[Result]) -> list[str]:
    """On a CPU, what RSS is, and which precision's process took more than the unquantized model's."""
    sizes = {r.label: r.memory.get("peak of runs", {}).get("rss") for r in results if r.devices == ["cpu"]}
    if not any(sizes.values()):
        return []
    lines = ["RSS counts libraries and freed memory too: the weights themselves are what is stored."]
    base = next((sizes.get(r.label) for r in results if r.name == "none"), None)
    more = [f"{label} {gib(size)}" for label, size in sizes.items() if base and size and size > base]
    if more:
        label = next(r.label for r in results if r.name == "none")
        lines.append(f"Processes that took more RAM than {label}'s ({gib(base)} GiB): {', '.join(more)}.")
    return lines
