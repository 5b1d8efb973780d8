"""Hand-made Results for the tests of what is computed and printed from them; nothing here is measured."""

import io
import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import qwquanto
from _qwquanto.console import render
from _qwquanto.report import report
from _qwquanto.results import Benchmark, Compiled, Quality, Result, Run
from _qwquanto.settings import PRECISIONS
from _qwquanto.settings import parse as parse_constants
from _qwquanto.stats import decode_rate, mean_over_prompts

GIB = 2**30
KILLED = "its process was killed by SIGKILL (out of memory?)"


def parse(argv):
    """Settings and the other flags, from the script's constants."""
    return parse_constants(argv, vars(qwquanto), Path(qwquanto.__file__))


def settings(**changes):
    """Settings of the constants as they are in the file."""
    return replace(parse([])[0], **changes)


def run(rate=10.0, tokens=40, **changes):
    """A run of `tokens` tokens, evenly `rate` a second."""
    gaps = [1 / rate] * (tokens - 1)
    known = {
        "seed": 0,
        "prompt_tokens": 7,
        "generated_tokens": tokens,
        "stop_reason": "length",
        "latency_s": 4.0,
    }
    known |= {"ttft_s": 0.05, "decode_tokens_per_s": rate if gaps else None, "tokens_per_s": tokens / 4}
    known |= {"inter_token_s": gaps, "text": "The [bold] answer\nis :key: 42."}
    return Run(**known | changes)


def runs(*rates, **changes):
    return [run(rate, **changes) for rate in rates]


def quality(kl, error=0.0001, prompts=16, **changes):
    """KL of this mean and standard error over prompts, a position each; all of them on the same text."""
    spread = (error or 0) * math.sqrt(prompts - 1)
    known = {"reference": "none", "positions": 200, "kl_divergence": kl, "kl_standard_error": error}
    known |= {"kl_p99": 10 * kl, "same_top_token": 0.9, "low": 0.85, "high": 0.93, "text_id": "a1b2"}
    known |= {"kl_positions": [[kl + (spread if i % 2 else -spread)] for i in range(prompts)]}
    return Quality(**known | changes)


def quality_of(positions, **changes):
    """A judgement with these figures of each prompt's positions."""
    mean, error = mean_over_prompts(positions)
    return replace(quality(mean, error), kl_positions=positions, **changes)


def result(weights="int8", rates=(10.0, 10.0), kl=None, stored=GIB, compare=(), **changes):
    """A complete Result on a CPU: 2 GiB unquantized, half of it in layers that Quanto reaches."""
    known = {"settings": settings(weights=None if weights == "none" else weights, compare=[*compare])}
    known |= {"environment": {"cpu": "Some CPU", "ram": "8 GiB", "torch": "2.13.0"}, "devices": ["cpu"]}
    known |= {
        "dtype": "bfloat16",
        "generation": {"top_k": 50, "top_p": None},
        "load_s": 1.5,
        "parameters": GIB,
    }
    known |= {"weight_bytes": stored, "unquantized_bytes": 2 * GIB, "quantizable_bytes": int(1.8 * GIB)}
    known |= {"quantized_layers": 4, "linear_layers": 5, "weight_types": {"WeightQBytesTensor": 4}}
    known |= {"kernels": {"quanto::qbytes_mm": 4, "aten::mm": 1}}
    known |= {"memory": {"before load": {"rss": GIB}, "peak of runs": {"rss": 3 * GIB}}, "runs": runs(*rates)}
    known |= {"memory_bytes_per_s": {"cpu": 2e10}, "bandwidth_utilization": 0.5, "complete": True}
    known |= {"eager_complete": changes.get("complete", True)}
    known |= {"prefill_tokens": 512, "prefill_tokens_per_s": 500.0, "prefill_rates": [490.0, 500.0, 510.0]}
    known |= {"is_reference": weights == "none", "quality": None if kl is None else quality(kl)}
    return Result(**known | changes)


def compiled(*rates, **changes):
    known = {"way": "this script's compiled decode step", "seconds": 61.0, "graphs": 3, "runs": runs(*rates)}
    return Compiled(**known | {"bandwidth_utilization": 0.8} | changes)


def comparison():
    """One of all five precisions: one failed, one is broken; int8 tried torch.compile(model)."""
    each = {"compare": [*PRECISIONS]}
    return [
        result("none", (19.9, 20.1), stored=2 * GIB, **each),
        result("int8", (9.9, 10.1), 0.004, stored=int(1.1 * GIB), torch_compile_graphs=0, **each),
        result("float8", (), stored=int(1.1 * GIB), **each, failure=KILLED, complete=False),
        result("int4", (14.8, 15.2), 0.2, stored=int(0.7 * GIB), **each),
        result("int2", (5.0, 5.01), 4.2, stored=int(0.45 * GIB), **each),
    ]


def compiled_comparison():
    """The same with --compile."""
    made = comparison()
    for r, rates in zip(made, ((30, 31), (40, 42), (), (35, 36), (20, 21)), strict=True):
        r.settings = replace(r.settings, compile=True)
        judged = quality(r.quality.kl_divergence * 1.001 if r.quality else 0.0002)
        r.compiled = compiled(*rates, quality=judged) if rates else None
    return made


def interrupted():
    """A comparison that Ctrl-C ended within its second precision."""
    first, second = comparison()[:2]
    unfinished = {"quality": None, "torch_compile_graphs": None, "eager_complete": False, "complete": False}
    second = replace(second, runs=second.runs[:1], **unfinished)
    return Benchmark([first, second], interrupted=True)


def text(parts, width=80):
    """What a terminal of this width shows."""
    console = Console(width=width, highlight=False, emoji=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def piped(benchmark):
    """What standard output gets where it is no terminal."""
    out = io.StringIO()
    render(report(benchmark), out)
    return out.getvalue()


def files():
    """Two saved files: a comparison, and the same with --compile on a newer torch, faster, int4 better."""
    before, after = comparison()[:-1], compiled_comparison()
    before[3] = replace(before[3], runs=runs(14.9, 15.0, 15.1))
    for r in after:
        r.environment = r.environment | {"torch": "2.14.0"}
    after[3] = replace(after[3], quality=quality(0.1), runs=runs(17.9, 18.0, 18.1))
    dates = [f"2026-11-{day}T10:00:00+00:00" for day in (25, 26)]
    return ["before.json", "runs/after.json"], [
        Benchmark(before, date=dates[0]),
        Benchmark(after, date=dates[1]),
    ]


def gpu_memory(r, kv=36 * 1024, activations=75 * 1024):
    """Of a GPU of which others use 1 GiB: CUDA's context takes 0.6 GiB, the allocator holds 0.1 GiB more than
    is in tensors, of which 0.05 GiB are neither weights nor of the context's length."""
    tokens = max((run.prompt_tokens + run.generated_tokens for run in r.runs), default=0)
    short = r.weight_bytes + int(0.05 * GIB) + kv * tokens
    peaks = {
        "load": r.weight_bytes,
        "runs": short,
        "prefill": short + kv * (512 - tokens) + activations * 512,
    }
    seen = {"at start": {"cuda:0 used": GIB}, "before load": {"cuda:0 used": int(1.6 * GIB)}}
    for phase, size in peaks.items():
        seen[f"peak of {phase}"] = {"cuda:0 allocated": size, "cuda:0 used": size + int(1.7 * GIB)}
    return seen


def on_gpu(name, rates=(20, 20), kl=None, stored=2 * GIB, **changes):
    """A Result on an empty GPU of 80 GiB."""
    made = result(name, rates, kl, stored, devices=["cuda:0"], memory_bytes_per_s={"cuda:0": 3e12}, **changes)
    made.memory, made.device_memory_bytes = gpu_memory(made), {"cuda:0": 80 * GIB}
    made.kv_bytes_per_token, made.max_positions = 36 * 1024, 32768
    return made


def gpu_comparison():
    """The widest: energy, prefill of five digits, a failure, slow and fast precisions."""
    made = compiled_comparison()
    for r in made:
        r.devices, r.memory_bytes_per_s = ["cuda:0"], {"cuda:0": 2.95e12}
        if r.compiled:
            rate = decode_rate(r.compiled.runs)
            r.compiled.runs, r.compiled.step_s = runs(0.999 * rate, 1.001 * rate), 0.95 / rate
        r.prefill_tokens_per_s, r.prefill_rates = 17500.0, [17300.0, 17800.0]
        r.memory, r.device_memory_bytes = gpu_memory(r), {"cuda:0": 80 * GIB}
        r.kv_bytes_per_token, r.max_positions = 36 * 1024, 32768
        for each in (r.runs, r.compiled.runs if r.compiled else []):
            each[:] = [
                replace(x, ttft_s=0.03 + i / 1000, energy_j={"cuda:0": 139.0}) for i, x in enumerate(each)
            ]
    return made


BENCHMARKS = {
    "single": Benchmark([result(warmup=[run(9, tokens=16)], runs=[*runs(10, 10.2), run(tokens=1)])]),
    "chinese": Benchmark(
        [result("none", runs=runs(10, text="如何计算矩阵的行列式？" * 40), compare=("none",))]
    ),
    "comparison": Benchmark(comparison()),
    "compiled": Benchmark(
        [result(warmup=[run(9, tokens=16)], compiled=compiled(20, 21, warmup=runs(18, 19, tokens=16)))]
    ),
    "compiled comparison": Benchmark(compiled_comparison()),
    "gpu comparison": Benchmark(gpu_comparison()),
    "failed": Benchmark([result(failure="its process ended with exit code 1", complete=False)]),
    "interrupted": interrupted(),
    "random weights": Benchmark([result(settings=settings(random_weights=True))]),
}
