#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "optimum-quanto==0.2.7",
#   "transformers==5.23.0",
#   "accelerate==1.15.0",
#   "torch==2.13.0",
#   "nvidia-ml-py==13.615.71",
#   "rich==15.0.0",
#   "psutil==7.2.2",
# ]
# ///
"""What does Quanto do to my model on my machine, and is it what one is told to expect?

Loads a causal language model quantized by Hugging Face's Quanto, runs one question five times and reports
speed, memory and, in a comparison, quality.

    python qwquanto.py                    # the model and the precision of the constants below
    python qwquanto.py --random-weights   # the same modules, bytes and speed, and nothing to download
    python qwquanto.py --compare          # none, int8, float8, int4 and int2 beside each other
    python qwquanto.py --compare --compile --results all.json --report all.svg
    python qwquanto.py --compare --chart all.png   # and a picture of it (pip install matplotlib)
    python qwquanto.py --show all.json other.json --chart both.svg

Every number, as the report names it (the JSON has them in seconds and bytes, null where unknown):

    TTFT             time to first token: from the call of generate() until the first new token is sampled
    decode tokens/s  (new tokens - 1) / (time of the last - time of the first): N tokens have N-1 intervals
                     Medians, ± and ratios rest on the same tokens: the first ones, that all runs of all rows
                     reached, eager and compiled; runs of fewer than 32 tokens, and on a CPU those beside
                     which other programs used over 10 % of it, are left out
    ±                sample standard deviation
    inter-token      the gaps between tokens; percentiles pool all timed runs
    pace             decode tokens/s over the first and over the last tenth of answers of 200 tokens and more
    latency          the whole generate() call, device synchronized at both ends
    tokens/s         new tokens / latency: the plain figure that most scripts print
    prefill          512 prompt tokens / time to first token (llama-bench's pp512), measured by itself
    512+128 s        512 / prefill + 127 / decode tokens/s: a long question, computed. The rate is slowed down
                     by what decoding after that prompt took longer than after the question, timed in turn
    weights          stored bytes of parameters and buffers, seen through Quanto's wrappers, tied tensors once
    saved            1 - weights / the same model unquantized, in the dtype it is loaded in
    allocated        bytes in torch's tensors; reserved: what its allocator holds; used: whole device (NVML)
    peak             in a comparison: used at most in eager runs, above what was in use before this program
                     touched the GPU, so CUDA's context counts; RSS on a CPU. Tensors: allocated at most
    KV cache         bytes of keys and values that 1,000 tokens add, from the cache that the runs filled
    has room for     what a card's memory, less 5 % and that peak, holds of a longer prompt: keys, values and
                     activations a token, as the peaks of a short and of a long prompt show them
    RSS              physical memory of this process: mapped files and freed heap, which glibc keeps, count
                     too, as in a program of yours, so it is not the model
    MBU              memory bandwidth utilization: bytes of weights that decode must read a second over what
                     this device's memory delivers, measured before the model is loaded. A lower bound: the
                     KV cache is read too, little beside the weights until the context is long
    energy           difference of the GPU's own energy counter over warm-up and timed runs of one kind, never
                     over compiling; joules a token and mean watts, where they took at least one second
    GPU at work      time of the kernels of one profiled eager decode step over that of an unprofiled one: the
                     rest of the time the GPU waits for the host
    KL               KL(reference || quantized) in nats of the next token, along the reference's answers to
                     sixteen prompts (the question and fifteen built in), sampled at temperature 1 from all
                     tokens; or along QUALITY_TEXT: mean of the prompts' means ± its standard error. The
                     reference is the unquantized model or, where that did not run, the most precise one
                     that did
    same top token   share of those positions at which both models rank the same token first, 95 % interval
                     over prompts
    perplexity       exp of the mean negative log-probability of QUALITY_TEXT's tokens
    greedy answer    to the question, up to 64 tokens: how many of the reference's first ones are the same
    the floor        KL of the reference's compiled step against the reference itself: rounding
    speed-up         a median decode rate over the unquantized model's, both eager or both compiled
    yardstick        seconds of a fixed job of small operations, before, between and after the runs (host_s in
                     the JSON): how fast the host of a GPU was meanwhile

Timed runs follow warm-up runs; run i is seeded with SEED + i. Decode of a language model at batch size one
reads every weight once a token, so memory bandwidth is its ceiling: MBU says how near it is.

Each claim stands under the name of who makes it: introductions to Quanto, or Quanto's own README. The rules
of the recommendation stand in advice.py.

Verdicts rest on 95 % intervals: of KL by Student's t over the prompts, since positions of one prompt are
alike; of a ratio of speeds by Welch's method on the logarithms of the rates, with what differs between
processes that measure the same. It holds the ratio as it is, and as it would be beside the same memory
bandwidth or, on a GPU, the same yardstick: a machine that is shared is now twice as fast, now half. (CUDA
graphs that fill a token's time wait for no host.) A limit is judged first. A speed whose interval holds it is
borderline or, where the ends differ by over 1.5 times, too noisy: measure again. About equal is what lies
within 10 % and holds 1; the fastest is named where its interval excludes all others.
Answers are kept up to 0.05 nats, changed up to 0.5 and broken above: the author's choice.

The chart shows the same rows in three panels: speed, memory, answers. The colour of a bar says what became of
the answers; the grey behind it reaches to where the memory's bandwidth ends (speed), or to the peak (memory).

`--compile` measures this script's own compiled decode step (static cache, Quanto's numbers as plain tensors,
CUDA graphs, a sampling loop in which the GPU does not wait), beside the eager model that a program of yours
would get; `compile_decode` gives that step to a program.

Where it is done, in the folder _qwquanto beside this file (its __init__.py has the map):

    QuantoConfig(weights="int8")       worker/loading.py, and worker/quanto.py for what has to be patched
    the NVML and torch.cuda snapshots  worker/devices.py
    the question, five times           worker/generation.py, in the order of worker/measure.py
    quality in a comparison            worker/quality.py
    the report                         report.py, memory.py; its figures in stats.py and fit.py
    what the figures mean              claims.py, verdicts.py; which precision to take: advice.py
    the chart                          chart.py, on panels.py and sheet.py

This program never imports torch: supervisor.py starts a process for each precision that does.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # search this folder last: no file in it may shadow a library

import os
import shlex
import signal
from pathlib import Path
from typing import Any

# ------------------------------------------------------------------------------------------------- constants
# Edit these; each is also a flag: MAX_LENGTH = --max-length.
MODEL_NAME: str = "Qwen/Qwen2.5-3B"  # Hub id or local folder: "Qwen/Qwen2.5-7B", "./my-model"
WEIGHTS: str | None = "int8"  # "float8", "int8", "int4", "int2", or None: as stored (--weights none)
COMPARE: tuple = ()  # precisions to compare; --compare alone: none int8 float8 int4 int2
DEVICE: str = "auto"  # "cuda", "cuda:1", "mps", "cpu"; auto: what works, one GPU if the model fits it
DTYPE: str = "auto"  # the checkpoint's own; "float16" for GPUs before Ampere, "bfloat16", "float32"
COMPILE: bool = False  # measure this script's compiled decode step too: half a minute or so more
QUANTO_KERNELS: bool = False  # True leaves Quanto as shipped: it compiles kernels, some of them wrong
RANDOM_WEIGHTS: bool = False  # no download: speed and memory hold, text and quality do not
QUESTION: str = "如何计算矩阵的行列式？请详细解释计算步骤。"  # the prompt
CHAT: bool = False  # wrap the question in the model's chat template (Instruct models)
RUNS: int = 5  # timed runs
WARMUP_RUNS: int = 1  # untimed runs before them, shown apart; short ones are repeated for 5 seconds
MAX_LENGTH: int = 2048  # prompt + new tokens
MAX_SECONDS: float = 60  # a run also ends here, so that a slow machine finishes too
COMPARE_TOKENS: int = 128  # new tokens of every run in a comparison: the same work for each precision
QUALITY_TOKENS: int = 256  # tokens that quality is judged on, in equal shares of 16 prompts; 0: skip quality
QUALITY_TEXT: str | None = None  # a text file of yours (UTF-8) to judge quality on instead
TEMPERATURE: float = 0.7  # of the sampling; lower is more deterministic
DO_SAMPLE: bool = True  # False: greedy
SEED: int = 0  # run i is seeded with SEED + i
TRUST_REMOTE_CODE: bool = False  # True runs code from the model's repository; Qwen2.5 needs none
RESULTS: str | None = None  # file for all numbers as JSON; "-": standard output
REPORT: str | None = None  # file for the report as a picture or a page: "report.svg", "report.html"
CHART: str | None = None  # file for a chart: "chart.svg", "chart.png"; drawn by matplotlib (pip install it)
# -----------------------------------------------------------------------------------------------------------

# Until main() installs its own handler, Ctrl-C exits quietly instead of with a traceback from an import;
# where Ctrl-C is ignored already (sh: script &), it stays so.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def __getattr__(name: str) -> Any:
    """`compile_decode`, for a program of yours: torch is imported when it is asked for."""
    if name == "compile_decode":
        from _qwquanto.compiled import compile_decode

        return compile_decode
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 for a failure, 2 for impossible settings, 130 after Ctrl-C."""
    # here: a program that imports this file for compile_decode needs none of these
    from _qwquanto import console, report, results, saved, settings, supervisor

    for stream in (sys.stdout, sys.stderr):
        # the report has Chinese and bars, whatever the locale
        stream.reconfigure(encoding="utf-8", errors="replace")
    sys.stderr = console.LastingStream(sys.stderr)
    s, args = settings.parse(argv, globals(), Path(__file__))
    # saved results need none of the settings but where pictures of them go
    problems = settings.check(s) + settings.unused(s, args.given)
    if problems := [text for text in problems if text.startswith(("REPORT ", "CHART ")) or not args.show]:
        print(*(f"qwquanto: {text}" for text in problems), sep="\n", file=sys.stderr)
        return 2
    if args.show:
        return saved.show(args.show, s.report, s.chart)

    typed = shlex.join(["python", "qwquanto.py", *(sys.argv[1:] if argv is None else argv)])
    stop, benchmark, view = supervisor.Interruption(), results.Benchmark([], command=typed), console.View()
    file = results.ResultsFile(s.results, benchmark)
    with view.progress:
        problems = supervisor.measure_all(s, file.save, view, stop, args.debug)
    benchmark.interrupted = stop.seen
    file.save()

    problems += report.print_report(s, benchmark) + file.problems
    if stop.seen:
        measured = any(r.memory for r in benchmark.results)
        problems.append("interrupted" + ("; the report holds what was finished" if measured else ""))
    print(*(f"qwquanto: {text}" for text in problems), sep="\n", end="\n" * bool(problems), file=sys.stderr)
    failed = any(r.failure and not (r.unavailable and s.compare) for r in benchmark.results)
    return 130 if stop.seen else int(bool(problems) or failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except ModuleNotFoundError as error:
        if error.name.startswith("_qwquanto"):
            sys.exit("qwquanto: the folder _qwquanto belongs beside qwquanto.py: clone the repository")
        lacks = f"this Python lacks {error.name}: pip install -r requirements.txt, or .venv/bin/python"
        sys.exit(f"qwquanto: {lacks}")
