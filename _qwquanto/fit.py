"""Does it fit: what a precision takes of a device's memory, and the context that another one has room for.

Pure; imports results.
"""

from __future__ import annotations

import math

from _qwquanto.results import Result

USABLE = 0.95  # of a card: the rest is the driver's and the screen's
LEAST_TOKENS = 256  # of a context that is worth being called one
CARDS_GIB = (8, 12, 16, 24)  # common sizes


def device_peak(r: Result, phase: str = "peak of runs") -> int | None:
    """Bytes of its devices that the program took at most, by the devices' own count; None if unknown.

    On GPUs what was in use before the program touched them is left out, and CUDA's context counts; on a CPU
    it is the whole process (RSS).
    """
    peak = r.memory.get(phase, {})
    if r.devices in (["cpu"], ["mps"]):
        return peak.get("rss" if r.devices == ["cpu"] else "mps reserved")
    before = r.memory.get("at start", {})
    names = [f"{device} used" for device in r.devices]
    if not names or not all(name in peak and name in before for name in names):
        return None
    return sum(peak[name] - before[name] for name in names)


def tensor_peak(r: Result, phase: str = "peak of runs") -> int | None:
    """Bytes in torch's tensors at most; None where torch keeps no count (CPU)."""
    held = [n for name, n in r.memory.get(phase, {}).items() if name.endswith("allocated")]
    return sum(held) if held else None


def peak_bytes(r: Result) -> tuple[int | None, str]:
    """Peak of the runs, and of what: tensors on all devices, or RSS where torch keeps no count (CPU)."""
    tensors = tensor_peak(r)
    return (r.memory.get("peak of runs", {}).get("rss"), "RSS") if tensors is None else (tensors, "tensors")


def memory_taken(r: Result) -> int | None:
    """The best that is known: the device's count, else tensors or RSS."""
    return device_peak(r) or peak_bytes(r)[0]


def context_of_runs(r: Result) -> int:
    """Tokens of prompt and answer that the longest eager run had."""
    return max((run.prompt_tokens + run.generated_tokens for run in r.runs), default=0)


def bytes_per_prompt_token(r: Result) -> float | None:
    """Bytes that a token of a longer prompt adds: keys and values, and its activations while it is read.

    From the peaks of a short prompt with an answer and of the prompt that prefill was measured with: what
    both hold (weights, a layer widened to 16 bit) drops out. Never less than keys and values.
    """
    kv, short, long = r.kv_bytes_per_token, tensor_peak(r), tensor_peak(r, "peak of prefill")
    if kv is None or short is None or long is None or not r.prefill_tokens:
        return kv
    without_cache = short - kv * context_of_runs(r)
    return max(kv, (long - without_cache) / r.prefill_tokens)


def context_that_fits(r: Result, card_bytes: float) -> int | None:
    """The longest context that an empty GPU with so much memory has room for: 0 for none, None if unknown."""
    peak, per_token = device_peak(r), bytes_per_prompt_token(r)
    if (
        peak is None
        or not per_token
        or not r.runs
        or len(r.devices) > 1
        or not r.devices[0].startswith("cuda")
    ):
        return None
    usable = USABLE * card_bytes
    room = usable - (peak - r.kv_bytes_per_token * context_of_runs(r))
    tokens = min(int(max(0, room) / per_token), r.max_positions or math.inf)
    return tokens if tokens >= LEAST_TOKENS and (device_peak(r, "peak of load") or 0) <= usable else 0


def context_text(r: Result, tokens: int) -> str:
    """Tokens of context, rounded down to two digits: "12,000", "all 32,768" of the model's, or "none"."""
    if tokens and tokens == r.max_positions:
        return f"all {tokens:,}"
    step = 10 ** max(0, len(str(tokens)) - 2)
    return f"{tokens // step * step:,}" if tokens else "none"
