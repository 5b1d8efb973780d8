"""One timed generate(), and runs of it: warm-up, timed, prefill, one profiled step. torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from _qwquanto.channel import log, reading_status, save, status
from _qwquanto.compiled.prepare import graphs_compiled, max_positions
from _qwquanto.results import Compiled, Result, Run
from _qwquanto.settings import Settings
from _qwquanto.stats import DISTURBED, median, utilization
from _qwquanto.text import duration, format_3g, plural
from _qwquanto.worker.devices import energy_j, host_yardstick, peak_memory, processor_share, synchronize
from _qwquanto.worker.loading import NO_FIT_ADVICE

# Each warm-up run lasts so many tokens and seconds at least, unless its answer ends first; runs are repeated
# until the same seconds have passed in all: a GPU machine is slow at first.
WARMUP_TOKENS, WARMUP_S = 16, 5
PREFILL_TOKENS, PREFILL_S = 512, 10  # as llama-bench's pp512; seconds after which it is measured no more
PREFILLS, PREFILLS_ON_GPU = 4, 12  # at most, the first of which does not count: a GPU's host varies
TOKENS_AFTER_PREFILL = 8  # decoded after each of those prompts
HOST_BUSY = 0.2  # share of a GPU's host that other programs may use before it deserves a note
PLANNED_TOKENS = 24  # to see what cuDNN's attention costs: two seconds
TORCH_COMPILE_S = 300  # that torch.compile(model) may be silent, for the day when it compiles


@dataclass
class Bench:
    """One configuration on its devices: what its generations need, filled while it is set up."""

    settings: Settings
    devices: list[str] = field(default_factory=lambda: ["cpu"])
    handles: dict[str, Any] = field(default_factory=dict)  # device -> NVML's
    advice: str = NO_FIT_ADVICE  # for a lack of memory
    model: Any = None
    tokenizer: Any = None
    prompt: Any = None  # token ids, shape [1, prompt tokens]
    new_tokens: int = 0  # at most; exactly, in a comparison
    positions_left: float = 0  # that the model has after the prompt
    plans: list[Any] = field(default_factory=list)  # where quality is judged, see `plan_quality`
    left_out_cudnn: bool = False  # its attention, see `leave_out_cudnn_attention`
    compiled: Any = None  # the CompiledDecode, once there is one
    kv_bytes_per_token: float | None = None  # of the latest eager generation


def generation_options(bench: Bench) -> dict[str, Any]:
    """generate()'s options. max_new_tokens, as Qwen2.5's generation_config makes it ignore max_length."""
    s = bench.settings
    options = {"max_new_tokens": bench.new_tokens, "do_sample": s.do_sample}
    if s.do_sample:
        options["temperature"] = s.temperature
    if s.compare:  # all of them: the end is ignored, not forbidden, which costs kernels for every token
        options["eos_token_id"] = None
    return options


def cache_bytes_per_token(cache: Any) -> float | None:
    """Bytes of keys and values that one more token adds to the cache of an eager generation.

    Layers of linear attention hold no keys, and do not grow. None where a window ends the growth of some, or
    layers hold different numbers of tokens.
    """
    layers = getattr(cache, "layers", ())
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        return None
    held = [
        (layer.keys, layer.values)
        for layer in layers
        if isinstance(getattr(layer, "keys", None), torch.Tensor)
    ]
    lengths = {keys.shape[-2] for keys, _ in held}
    if len(lengths) != 1 or 0 in lengths:
        return None
    return sum(keys.nbytes + values.nbytes for keys, values in held) / lengths.pop()


def generate(
    bench: Bench,
    title: str,
    timeout_s: float = math.inf,
    least: int = 0,
    prompt: Any = None,
    part: tuple[int, int] = (0, 1),
    **options: Any,
) -> tuple[list[int], list[float], float]:
    """One generate(): the new tokens, seconds from its start until each of them, and until its end.

    It ends early after `timeout_s`, but has `least` tokens. The time of every token is taken by a stopping
    criterion, which is called after sampling. On CUDA it records an event: waiting for the device would keep
    the host from launching the rest of the step (that and a heavier `peak_memory` cost a compiled token on an
    H100 4.6 %). On MPS it waits, since events are unreliable there (pytorch #196395), and is called once more
    than there are tokens (transformers generation/utils.py, DeferredStopCheck). The progress shown is of all
    parts, of which this is `part`: (0, 16) is the first of sixteen.
    """
    prompt = bench.prompt if prompt is None else prompt
    device = prompt.device
    shown = -math.inf  # the first token ends the reading, and is shown at once
    events = []  # of the start and of each token: CUDA's, or seconds

    def mark() -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            events.append(torch.cuda.current_stream(device).record_event(event))
        else:
            synchronize([device.type])
            events.append(time.perf_counter())

    def after_token(input_ids: Any, scores: Any, **_: Any) -> bool:
        nonlocal shown
        mark()
        tokens, seconds = len(events) - 1, time.perf_counter() - begin
        if seconds - shown > 0.2:
            shown = seconds
            done = min(1.0, max(tokens / options["max_new_tokens"], seconds / timeout_s))
            text = f"{title}: {tokens} tokens, {tokens / seconds:.1f} tokens/s"
            status(text, (part[0] + done) / part[1])
        return seconds >= timeout_s and tokens >= least

    options |= {"attention_mask": torch.ones_like(prompt), "stopping_criteria": [after_token]}
    options |= {"pad_token_id": 0}  # one sequence is never padded; None would be warned of
    options |= bench.compiled.options if bench.compiled else {}
    reading_status(title)
    synchronize(bench.devices)
    begin = time.perf_counter()
    mark()
    output = bench.model.generate(prompt, return_dict_in_generate=True, **options)
    synchronize(bench.devices)
    latency_s = time.perf_counter() - begin
    if not bench.compiled:  # the compiled step's cache has its full length from the beginning
        bench.kv_bytes_per_token = cache_bytes_per_token(getattr(output, "past_key_values", None))
    new = output.sequences[0, prompt.shape[1] :].tolist()
    first = events[0]
    times = [first.elapsed_time(e) / 1000 if device.type == "cuda" else e - first for e in events[1:]]
    return new, times[: len(new)], latency_s


def run_once(bench: Bench, seed: int, title: str, warm_up: bool = False) -> Run:
    """One timed generation of the question; a warm-up ends early, after WARMUP_TOKENS and WARMUP_S."""
    s = bench.settings
    timeout_s, least = (WARMUP_S, WARMUP_TOKENS) if warm_up else (s.max_seconds, 0)
    torch.manual_seed(seed)
    energy = energy_j(bench.handles)
    new, times, latency_s = generate(bench, title, timeout_s, least, **generation_options(bench))
    spent = {d: now - energy[d] for d, now in energy_j(bench.handles).items() if d in energy}
    ended_early = "time" if latency_s >= timeout_s else "eos"
    return Run(
        seed=seed,
        prompt_tokens=bench.prompt.shape[1],
        generated_tokens=len(new),
        stop_reason="length" if len(new) == bench.new_tokens else ended_early,
        latency_s=latency_s,
        ttft_s=times[0],
        decode_tokens_per_s=(len(new) - 1) / (times[-1] - times[0]) if len(new) > 1 else None,
        tokens_per_s=len(new) / latency_s,
        inter_token_s=[b - a for a, b in itertools.pairwise(times)],
        energy_j=spent or None,
        text=bench.tokenizer.decode(new, skip_special_tokens=True) if bench.tokenizer else "",
    )


def warmup_runs(bench: Bench) -> list[Run]:
    """WARMUP_RUNS untimed runs, and more until WARMUP_S have passed: a GPU is slow in its first seconds."""
    begin, runs = time.perf_counter(), []
    while len(runs) < bench.settings.warmup_runs or (runs and time.perf_counter() - begin < WARMUP_S):
        runs.append(run_once(bench, bench.settings.seed + len(runs), "warm-up", warm_up=True))
    return runs


def timed_runs(bench: Bench, result: Result, target: Result | Compiled, count: int) -> None:
    """`count` timed runs, the Result's own or its Compiled's, each handed on at once with a line."""
    kind = "eager " * bench.settings.compile
    runs = target.runs
    if target is not result:
        kind = "compiled "
    on_cpu = bench.devices == ["cpu"]
    yardstick = None if on_cpu else host_yardstick(bench.devices[0])
    target.host_s += [yardstick()] if yardstick else []
    beside_all = processor_share()
    with peak_memory(bench.devices, bench.handles, target.throttled) as peak:
        for i in range(count):
            left = duration((count - i) * median(r.latency_s for r in runs)) + " to go, " if runs else ""
            name = f"{kind}run {i + 1} of {count}"
            beside = processor_share()
            run = run_once(bench, bench.settings.seed + i, left + name)
            runs.append(run)
            run.others_cpu = beside() if on_cpu else None
            for short in (r for r in runs if on_cpu and r.others_cpu is None):  # a run of less than a second
                short.others_cpu = beside_all()
            target.host_s += [yardstick()] if yardstick else []
            result.memory["peak of runs" if target is result else "peak of compiled runs"] = peak()
            target.bandwidth_utilization = utilization(result, runs)
            save(result)
            tokens, rate = plural(run.generated_tokens, "token"), format_3g(run.decode_tokens_per_s)
            log(f"{name}: {tokens}, {rate} tokens/s, {run.latency_s:.1f} s")
    if not on_cpu and (beside_all() or 0) > HOST_BUSY:
        used = f"other programs used over {100 * HOST_BUSY:.0f} % of the host's processors"
        result.notes.append(f"{used} during the {kind}runs, which may be too slow by it")


def measure_prefill(bench: Bench, result: Result) -> None:
    """Tokens/s of prefill: random ids, PREFILLS times or fewer, of which the first does not count.

    Each goes on for some tokens, sampled as in the runs, where the model has room, and so does the question
    right after it: how much slower decoding is after a long prompt. Only in turn do the two tell that: a host
    that is shared decodes at half its speed for seconds (int2, H200: 5.4 or 10.8 tokens/s, after either).
    """
    config = bench.model.config.get_text_config()
    rates = []
    after, ratios = [], []  # decode tokens/s; over those after the question
    most = PREFILLS if bench.devices == ["cpu"] else PREFILLS_ON_GPU
    longest = max_positions(config)
    tokens = min(PREFILL_TOKENS, longest - 1)
    options = generation_options(bench) | {"eos_token_id": None}
    options["max_new_tokens"] = int(min(1 + TOKENS_AFTER_PREFILL, longest - tokens, bench.positions_left))
    ids = torch.randint(10, config.vocab_size - 10, (1, tokens)).to(bench.prompt.device)
    begin = time.perf_counter()
    beside = processor_share()
    with peak_memory(bench.devices, bench.handles) as peak:
        while not rates or (len(rates) < most and time.perf_counter() - begin < PREFILL_S):
            title = f"prefill of {tokens} tokens"
            _, times, _ = generate(bench, title, prompt=ids, **options)
            if not rates:  # before the question, which may be the longer one
                result.memory["peak of prefill"] = peak()
            rates.append(tokens / times[0])
            if len(times) > 1:
                after.append((len(times) - 1) / (times[-1] - times[0]))
                _, times, _ = generate(bench, "decoding after the question", **options)
                ratios.append(after[-1] * (times[-1] - times[0]) / (len(times) - 1))
    if bench.devices == ["cpu"] and (beside() or 0) > DISTURBED:
        used = f"other programs used over {100 * DISTURBED:.0f} % of the processor"
        result.notes.append(f"{used} while prefill was measured, which may be too slow by it")
    result.prefill_rates = rates[1:] or rates
    result.prefill_tokens, result.prefill_tokens_per_s = tokens, median(result.prefill_rates)
    result.decode_after_prefill_tokens_per_s = median(after[1:] or after)
    result.decode_after_prefill_ratio = median(ratios[1:] or ratios)
    save(result)


# quanto::qbytes_mm is left out: it calls one of the others
PRODUCTS = r"quanto::(?!qbytes_mm)|_weight_int\dpack_mm|aten::(mm|bmm|addmm|mkldnn_\w*linear\w*|_scaled_mm)$"


def profile_a_step(bench: Bench) -> tuple[dict[str, int], float | None]:
    """What one token calls, as in an eager decode step, by torch's profiler.

    Name -> calls of the matrix products; and seconds of all kernels on the GPU, None without one.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if bench.prompt.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        token = bench.prompt[:, -1:]
        generate(bench, "looking which kernels run", prompt=token, max_new_tokens=1, do_sample=False)
    events = profiler.key_averages()
    calls = {event.key: event.count for event in events if re.search(PRODUCTS, event.key)}
    on_gpu = [e.self_device_time_total for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    return dict(sorted(calls.items(), key=lambda item: -item[1])), sum(on_gpu) / 1e6 or None


def cudnn_attention(bench: Bench) -> dict[str, float]:
    """Seconds a token, median, with cuDNN's attention as torch ships it: at context lengths that this process
    has not had before ("first"), and at the same ones once more ("again")."""
    tokens = int(min(PLANNED_TOKENS, bench.positions_left))
    if not bench.left_out_cudnn or tokens < 3:
        return {}
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        found = {}
        for name in ("first", "again"):
            options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
            _, times, _ = generate(bench, "what cuDNN's attention costs", **options)
            found[name] = statistics.median(b - a for a, b in itertools.pairwise(times))
        return found
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def try_torch_compile(bench: Bench, result: Result) -> None:
    """Count what `model = torch.compile(model)`, as introductions have it, compiles for a few tokens."""
    wrapped = dataclasses.replace(bench, model=torch.compile(bench.model))
    graphs = graphs_compiled()
    generate(wrapped, "torch.compile(model) as written", max_new_tokens=4, do_sample=False)
    result.torch_compile_graphs = graphs_compiled() - graphs
    save(result)
