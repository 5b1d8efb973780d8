"""What people are told to expect of Quanto, by whom, and whether it is so here. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from _qwquanto.results import Result
from _qwquanto.settings import BITS
from _qwquanto.stats import (
    KL_KEPT,
    MIN_RATE_TOKENS,
    TOO_WIDE,
    decode_rate,
    is_float32,
    kl_difference,
    kl_interval,
    meets,
    saving,
    speed_interval,
)
from _qwquanto.text import format_3g, gib, interval_text, kl_text, percent, plural

INTROS = "intros"  # introductions, as blogs and tutorials have them
QUANTO = "Quanto"  # README of optimum-quanto 0.2.7: its "In a nutshell" and its features
COMPARABLE_SPEED = 0.9  # of the 16-bit speed: the introductions' 90-95 %, and Quanto's "comparable"
ABOUT = 0.85  # of the factor 16 / bits still counts as "approximately": scales and shifts need room
OPTIMIZED = r"_weight_int\dpack_mm|quanto::gemm"  # products of quantized weights as they are stored


@dataclass
class Expectation:
    """What somebody tells users to expect, what was measured here, and why it differs, if known."""

    by: str  # INTROS or QUANTO
    expected: str
    of: str  # precision, or several
    measured: str
    verdict: str  # met, not met, too close to call, unknown, no claim; of a speed see `speed_verdict`
    reason: str = ""


def expectations(results: list[Result]) -> list[Expectation]:
    """One per claim whose precisions were measured; claims against 16 bit are not judged against 32."""
    sixteen = [r for r in results if not is_float32(r)]
    by_name = {r.name: r for r in results}
    base, int8, float8, int4 = map(by_name.get, ("none", "int8", "float8", "int4"))
    found = []
    if int8 in sixteen and int8.weight_bytes:
        found.append(expected_saving(int8))
        if speeds_compare(int8, base):
            found.append(expected_speed(int8, base))
    if int8 and int8.torch_compile_graphs is not None:
        found.append(expected_torch_compile(int8))
    both = [r.quality for r in (float8, int8) if r and r.quality]
    if len(both) == 2 and (difference := kl_difference(*both)):
        low, high = difference
        said = meets((-high, -low), 0)
        measured = f"KL {kl_text(both[0])} against {kl_text(both[1])}"
        found.append(Expectation(INTROS, "more exact than int8", "float8", measured, said))
    if int8 and int4 and int8.weight_bytes and int4.weight_bytes:
        measured = f"{gib(int4.weight_bytes)} GiB against {gib(int8.weight_bytes)}"
        said = "met" if int4.weight_bytes < int8.weight_bytes else "not met"
        found.append(Expectation(INTROS, "smaller still than int8", "int4", measured, said))
    found += expected_factors(sixteen) + expected_latency(sixteen, base)
    for r in (int8, float8):
        if r and r.quality:
            low, high = kl_interval(r.quality)
            said = meets((-high, -low), -KL_KEPT)
            found.append(Expectation(QUANTO, "answers very close", r.label, f"KL {kl_text(r.quality)}", said))
    return found


def speeds_compare(r: Result, base: Result | None) -> bool:
    """Whether both were timed, on the same devices."""
    return bool(base and base.devices == r.devices and decode_rate(base.runs) and decode_rate(r.runs))


def speed_share(r: Result, base: Result) -> str:
    """A precision's eager speed as a share of the unquantized model's, with its interval."""
    rates = decode_rate(r.runs), decode_rate(base.runs)
    if not (interval := speed_interval(r, base)):
        return f"{format_3g(rates[0])} against {format_3g(rates[1])} tokens/s"
    return f"{percent(rates[0] / rates[1])} %{interval_text(interval, percent)}"


def speed_verdict(interval: tuple[float, float] | None, limit: float) -> str:
    """Whether a ratio of speeds is at least `limit`; where that is open, what to do.

    The limit comes first. An interval that holds it is borderline, or too wide to say anything.
    """
    if interval is None:
        return f"unknown: needs two undisturbed runs of {MIN_RATE_TOKENS} tokens"
    low, high = interval
    if low >= limit or high < limit:
        return "met" if low >= limit else "not met"
    if high > TOO_WIDE * low:
        return f"too noisy ({format_3g(low)} to {format_3g(high)} times): measure again"
    return "borderline"


def expected_saving(int8: Result) -> Expectation:
    """Judged by the stored weights, which are exact; what the program takes stands in the memory table."""
    measured = f"{percent(saving(int8))} % of the stored weights"
    said = "met" if saving(int8) >= 0.5 else "not met"
    measured += "; 8 of 16 bits can never save 50" * (said == "not met")
    bits = 8 * int8.unquantized_bytes / int8.parameters
    most = percent(int8.quantizable_bytes / int8.unquantized_bytes * (1 - 8 / bits))
    why = f"Memory: embeddings and output layer stay as stored, so 8 bits save at most {most} % here."
    return Expectation(INTROS, "50-60 % less memory", "int8", measured, said, why)


def expected_speed(int8: Result, base: Result) -> Expectation:
    """Eager, as a program of the user's own runs."""
    said = speed_verdict(speed_interval(int8, base), COMPARABLE_SPEED)
    why = "Speed: to the Python that eager decoding runs in every layer, Quanto adds its own"
    if int8.devices[0].startswith("cuda"):
        why += ", and it widens 8-bit weights to 16 bit on every call."
    else:
        why += "; small models feel it most."
    return Expectation(INTROS, "at least 90 % of the speed", "int8", speed_share(int8, base), said, why)


def expected_torch_compile(r: Result) -> Expectation:
    """Not timed: where torch captured no graph, what ran was the model as it is."""
    claim = "20-30 % faster by torch.compile(model)"
    graphs = r.torch_compile_graphs
    if graphs:
        return Expectation(
            INTROS, claim, r.label, f"{plural(graphs, 'graph')} compiled, not timed", "unknown"
        )
    why = "torch.compile: generate() runs the module inside the wrapper, so nothing is compiled"
    return Expectation(INTROS, claim, r.label, "no effect: 0 graphs", "not met", f"{why} (pytorch #161743).")


def layer_factor(r: Result) -> float | None:
    """By what Quanto divided the bytes of the layers that it quantized; None if unknown."""
    if not r.settings.weights or not r.quantized_layers or not r.weight_bytes or not r.quantizable_bytes:
        return None
    stored = r.weight_bytes - (r.unquantized_bytes - r.quantizable_bytes)
    return r.quantizable_bytes / stored if stored > 0 else None


def names(some: list[Result], quantized: list[Result]) -> str:
    """Some precisions of those measured, in few words."""
    return "all" if len(some) == len(quantized) > 1 else ", ".join(r.label for r in some)


def expected_factors(results: list[Result]) -> list[Expectation]:
    """Quanto's "device memory: approximately divided by float bits / integer bits", of its layers."""
    known = [r for r in results if layer_factor(r)]
    groups: dict[str, list[Result]] = {}
    for r in known:
        said = "met" if layer_factor(r) >= ABOUT * 16 / BITS[r.name] else "not met"
        groups.setdefault(said, []).append(r)
    found = []
    for said, members in groups.items():
        times = ", ".join(f"{r.label} {format_3g(layer_factor(r))}" for r in members)
        claim = "its layers about 16 / bits times smaller"
        found.append(Expectation(QUANTO, claim, names(members, known), f"{times} times", said))
    return found


def runs_optimized(r: Result) -> bool:
    """Whether most quantized layers of an eager step took a kernel that reads quantized weights as stored."""
    calls = sum(count for name, count in r.kernels.items() if re.search(OPTIMIZED, name))
    return bool(r.quantized_layers) and calls > r.quantized_layers / 2


def expected_latency(results: list[Result], base: Result | None) -> list[Expectation]:
    """Quanto's "whenever optimized kernels are available, ... comparable": of those that ran such kernels."""
    known = [r for r in results if r.settings.weights and r.kernels and speeds_compare(r, base)]
    claim = "comparable speed by optimized kernels"
    found = []
    for r in known:
        if runs_optimized(r):
            said = speed_verdict(speed_interval(r, base), COMPARABLE_SPEED)
            found.append(Expectation(QUANTO, claim, r.label, speed_share(r, base), said))
    if others := [r for r in known if not runs_optimized(r)]:
        measured = "few or no layers ran one"
        found.append(Expectation(QUANTO, claim, names(others, known), measured, "no claim"))
    return found
