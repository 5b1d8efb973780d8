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
    python qwquanto.py --show all.json other.json

Every number, as the report names it (the JSON has them in seconds and bytes, null where unknown):

    TTFT             time to first token: from the call of generate() until the first new token is sampled
    decode tokens/s  (new tokens - 1) / (time of the last - time of the first): N tokens have N-1 intervals
    ±                sample standard deviation; for rates: of runs of at least 32 tokens, over the positions
                     that all reached
    inter-token      the gaps between tokens; percentiles pool all timed runs
    pace             decode tokens/s over the first and over the last tenth of answers of 200 tokens and more
    latency          the whole generate() call, device synchronized at both ends
    tokens/s         new tokens / latency: the plain figure that most scripts print
    prefill          512 prompt tokens / time to first token (llama-bench's pp512), measured by itself
    weights          stored bytes of parameters and buffers, seen through Quanto's wrappers, tied tensors once
    saved            1 - weights / the same model unquantized, in the dtype it is loaded in
    allocated        bytes in torch's tensors; reserved: what its allocator holds; used: whole device (NVML)
    RSS              physical memory of this process: mapped files and freed heap, which glibc keeps, count
                     too, as in a program of yours, so it is not the model
    MBU              memory bandwidth utilization: bytes of weights that decode must read a second over what
                     this device's memory delivers, measured before the model is loaded. A lower bound: the
                     KV cache is read too, little beside the weights until the context is long
    energy           difference of the GPU's own energy counter, over at least one second
    GPU at work      time of the kernels of one profiled eager decode step over that of an unprofiled one: the
                     rest of the time the GPU waits for the host
    KL               KL(reference || quantized) in nats over the reference's greedy answer: mean ± standard
                     error. The reference is the unquantized model or, where that did not run, the most
                     precise one that did
    same top token   share of those positions at which both models rank the same token first, 95 % Wilson
                     interval
    speed-up         a median decode rate over the unquantized model's, both eager or both compiled

Timed runs follow warm-up runs; run i is seeded with SEED + i. Decode of a language model at batch size one
reads every weight once a token, so memory bandwidth is its ceiling: MBU says how near it is.

Verdicts rest on 95 % intervals: of a ratio of speeds by Welch's method on the logarithms of the rates,
widened by the ratio of the memory bandwidths that the two processes measured; of KL by its standard error. An
interval that holds the limit is too close to call. Answers are kept up to 0.05 nats, changed up to 0.5 and
broken above: the author's choice.

`--compile` measures this script's own compiled decode step (static cache, Quanto's numbers as plain tensors,
CUDA graphs, a sampling loop in which the GPU does not wait), beside the eager model that a program of yours
would get; `compile_decode` gives that step to a program.

The file has two parts. The program reads the constants, starts a worker for each precision and reports; it
never imports torch. The worker, this script again with --worker, loads and measures one precision.
"""

from __future__ import annotations

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
QUALITY_TOKENS: int = 256  # length of the reference answer that quality is judged on; 0: skip quality
TEMPERATURE: float = 0.7  # of the sampling; lower is more deterministic
DO_SAMPLE: bool = True  # False: greedy
SEED: int = 0  # run i is seeded with SEED + i
TRUST_REMOTE_CODE: bool = False  # True runs code from the model's repository; Qwen2.5 needs none
RESULTS: str | None = None  # file for all numbers as JSON; "-": standard output
REPORT: str | None = None  # file for the report as a picture or a page: "report.svg", "report.html"
# -----------------------------------------------------------------------------------------------------------

import os
import signal

# until main() takes over, Ctrl-C ends without an import's traceback, but where it is ignored (sh: script &)
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import itertools
import json
import math
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

try:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:
    sys.exit("qwquanto: this Python lacks its packages: pip install -r requirements.txt, or .venv/bin/python")

__version__ = "3.0.0"
SCHEMA = 2  # of the JSON; raise it only when a field gets another meaning: a new one has a default
READERS = {1: "qwquanto 2.0.0"}  # earlier schemas -> the version that reads them
PRECISIONS = ("none", "int8", "float8", "int4", "int2")  # in the order of running, see `measure_quality`
# another, which QuantoConfig must know, also concerns `expected_bytes`, `dequant_linear` and `expectations`
BITS = {"none": 16, "int8": 8, "float8": 8, "int4": 4, "int2": 2}
SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
KL_KEPT, KL_BROKEN = 0.05, 0.5  # nats: up to the first answers are kept, above the second they are broken
MIN_POSITIONS = 100  # of a KL: llama-perplexity prints no statistics on fewer
MIN_RATE_TOKENS = 32  # of a run whose rate counts for a spread
LONG_ANSWER_TOKENS = 200  # of a run that shows a pace
PLANNING = 1.2  # times the time of a token that a new context length must cost to be told
UNSTABLE = 0.05  # standard deviation over mean of the runs' decode rates that deserves a warning
SILENCE_S = 900  # a step that is silent for so long counts as hung; loading may take as long as it takes
HOST_BOUND = 0.5  # share of an eager step under which the GPU mostly waits for the host
ABOUT = 1.2  # times as fast, or as slow, that still counts as about the same speed
NO_NUMBER = "A figure was no number (NaN or infinite): it counts as unknown, and so does what it belongs to."
EXIT_S = 10  # for a worker to end by itself once it has measured everything


class Failure(Exception):
    """What went wrong and what to do about it, in one line for the user."""


# ===========================================================================================================
# PART 1: the program. Standard library and rich; it must not use a name of part 2 (a test holds it to that).
# ===========================================================================================================

# -------------------------------------------------------------------------------------------------- settings


def rule(holds: Callable[[Any], Any], allowed: str) -> dict[str, Any]:
    """The metadata of a field of Settings: whether a value is possible, and what is, in words."""
    return {"holds": holds, "allowed": allowed}


def is_writable(path: str) -> bool:
    """Whether a file can be written at this path; leaves none behind."""
    try:
        target = Path(path).resolve()
        tempfile.TemporaryFile(dir=target.parent).close()
        return not target.exists() or (target.is_file() and os.access(target, os.W_OK))
    except OSError:
        return False


def is_model(name: str) -> bool:
    """Whether this is a folder with a model, or can be a model's id on the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return (folder / "config.json").is_file()
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name))


def at_least(least: int) -> dict[str, Any]:
    return rule(lambda v: type(v) is int and v >= least, f"a whole number from {least} on")


def above_zero(hint: str = "") -> dict[str, Any]:
    return rule(lambda v: type(v) is not bool and 0 < v < math.inf, "a number above 0" + hint)


YES_OR_NO = rule(lambda v: type(v) is bool, "True or False")
DTYPES = ("auto", *SHORT_DTYPES)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A snapshot of the constants: one field each, in lower case, with its rule for `check`.

    A field that is added from now on has a default, so that older files stay readable.
    """

    model_name: str = field(
        metadata=rule(is_model, "a Hub id like Qwen/Qwen2.5-3B or a folder with a config.json")
    )
    weights: str | None = field(
        metadata=rule(
            lambda v: (v or "none") in PRECISIONS, f"one of {', '.join(PRECISIONS)} (none: as stored)"
        )
    )
    compare: list[str] = field(
        metadata=rule(
            lambda v: len({p or "none" for p in v} & set(PRECISIONS)) == len(v),
            f'some of {", ".join(PRECISIONS)}, each once (--compare none int8; COMPARE = ("none", "int8"))',
        )
    )
    device: str = field(
        metadata=rule(
            lambda v: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v), "auto, cuda, cuda:N, mps or cpu"
        )
    )
    dtype: str = field(metadata=rule(lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"))
    compile: bool = field(metadata=YES_OR_NO)
    quanto_kernels: bool = field(metadata=YES_OR_NO)
    random_weights: bool = field(metadata=YES_OR_NO)
    question: str = field(metadata=rule(lambda v: type(v) is str and v.strip(), "some text"))
    chat: bool = field(metadata=YES_OR_NO)
    runs: int = field(metadata=at_least(1))
    warmup_runs: int = field(metadata=at_least(0))
    max_length: int = field(metadata=at_least(2))
    max_seconds: float = field(metadata=above_zero())
    compare_tokens: int = field(metadata=at_least(2))
    quality_tokens: int = field(metadata=at_least(0))
    temperature: float = field(metadata=above_zero(" (for greedy decoding set DO_SAMPLE to False)"))
    do_sample: bool = field(metadata=YES_OR_NO)
    seed: int = field(metadata=at_least(0))
    trust_remote_code: bool = field(metadata=YES_OR_NO)
    results: str | None = field(
        metadata=rule(lambda v: v in (None, "-") or is_writable(v), "a file that can be written, or -")
    )
    report: str | None = field(
        metadata=rule(
            lambda v: v is None or (v.endswith((".svg", ".html")) and is_writable(v)),
            "a file that can be written, and ends in .svg or .html",
        )
    )


def convert(text: str, kind: str) -> Any:
    """The value that a flag's text means for a field of this type, or the text, for `check` to refuse."""
    if text.lower() == "none" and kind == "str | None":
        return None
    try:
        return {"int": int, "float": float}.get(kind, str)(text)
    except ValueError:
        return text


def parse(argv: list[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """Settings from the constants and their flags; and the flags without a constant: debug, show.

    The second also has `given`, the flags on the command line.
    """
    source = Path(__file__).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z_]+)(?::[^=]+)? = .*?  # (.+)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        "qwquanto.py", "python qwquanto.py [--FLAG VALUE ...]", __doc__.split("\n\n")[0], allow_abbrev=False
    )
    flags = []
    for f in dataclasses.fields(Settings):
        flag, default = "--" + f.name.replace("_", "-"), globals().get(f.name.upper())
        told = f"{comments.get(f.name.upper(), '')} (now: {default})".replace("%", "%%")
        flags += [flag]
        if f.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=told)
        elif f.name == "compare":
            parser.add_argument(flag, nargs="*", default=default, metavar="WEIGHTS", help=told)
        else:
            to = functools.partial(convert, kind=f.type)
            parser.add_argument(
                flag, type=to, default=default, metavar=f.name.split("_")[-1].upper(), help=told
            )
    parser.add_argument(
        "--show", nargs="+", metavar="FILE", help="print saved results; several beside each other"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and libraries' messages")
    parser.add_argument("--version", action="version", version=__version__)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        wrong = next((text for text in unknown if text.startswith("-")), unknown[0]).split("=")[0]
        close = difflib.get_close_matches(wrong, [*flags, "--show", "--debug", "--version"], 1)
        close += [f"--model-name {wrong}"] if "/" in wrong or Path(wrong).exists() else []
        parser.error(f"unexpected argument {wrong}" + (f": did you mean {close[0]}?" if close else ""))
    words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    args.given = [flag for flag in flags if flag in words]
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)}
    if "--compare" in args.given:
        values["compare"] = values["compare"] or list(PRECISIONS)
    elif "--weights" in args.given:  # whoever names one precision wants a single run, whatever COMPARE says
        values["compare"] = []
    if isinstance(values["compare"], tuple | set):
        values["compare"] = list(values["compare"])
    return Settings(**values), args


def check(s: Settings) -> list[str]:
    """Everything that is impossible about the settings, each with what is allowed."""
    problems = []
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        try:
            right = f.metadata["holds"](value)
        except (TypeError, AttributeError, RuntimeError):  # a constant edited to another type, ~nobody/model
            right = False
        if not right:
            problems.append(f"{f.name.upper()} must be {f.metadata['allowed']}, not {value!r}")
    return problems


def unused(s: Settings, given: list[str]) -> list[str]:
    """Flags on the command line that would do nothing, each with what to do."""
    if s.compare:
        told = "--weights is of a single run: name its precision behind --compare"
        return [told] if "--weights" in given else []
    return [
        f"{flag} is of a comparison: add --compare{instead}"
        for flag, instead in {"--compare-tokens": ", or take --max-length", "--quality-tokens": ""}.items()
        if flag in given
    ]


# --------------------------------------------------------------------------------------------------- results


@dataclass
class Run:
    """One generation. Seconds, joules; None where unknown. Defined in the docstring at the top."""

    seed: int
    prompt_tokens: int
    generated_tokens: int
    stop_reason: str  # eos, length or time
    latency_s: float
    ttft_s: float
    decode_tokens_per_s: float | None
    tokens_per_s: float
    inter_token_s: list[float]
    energy_j: dict[str, float] | None = None  # device -> joules
    text: str = ""


@dataclass
class Quality:
    """One model against the reference, over `positions` tokens of the latter's greedy answer. KL in nats."""

    reference: str  # its precision
    positions: int
    kl_divergence: float
    kl_standard_error: float | None
    kl_p99: float
    same_top_token: float
    low: float  # 95 % Wilson interval of same_top_token
    high: float


@dataclass
class Compiled:
    """This script's compiled decode step: seconds it took to prepare, its graphs, and its measurements."""

    way: str  # OWN_STEP or STATIC_CACHE
    seconds: float
    graphs: int
    recompilations: int = 0  # within timed runs
    warmup: list[Run] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    bandwidth_utilization: float | None = None
    quality: Quality | None = None


@dataclass
class Result:
    """What is known of one configuration; filled while it is measured. Bytes and seconds, None: unknown."""

    settings: Settings
    folder: str | None = None  # of the model's files
    environment: dict[str, str] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    dtype: str | None = None  # of the model as loaded, unquantized
    generation: dict[str, Any] = field(default_factory=dict)  # what generate() really used
    load_s: float | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    device_weight_bytes: dict[str, int] = field(default_factory=dict)
    unquantized_bytes: int | None = None
    quantizable_bytes: int | None = None  # of the unquantized bytes, those in layers that Quanto quantizes
    quantized_layers: int | None = None
    linear_layers: int | None = None
    skipped_layers: int = 0  # linear layers with a forward of their own, which Quanto would replace
    weight_types: dict[str, int] = field(default_factory=dict)  # Quanto's tensor class -> layers
    kernels: dict[str, int] = field(default_factory=dict)  # matrix products of one eager decode step -> calls
    kernel_s: float | None = None  # of all kernels of that step on the GPU
    cudnn_attention_s: dict[str, float] = field(default_factory=dict)  # first, again: see `cudnn_attention`
    defects: dict[str, str] = field(
        default_factory=dict
    )  # of Quanto as shipped with this model on this machine
    memory: dict[str, dict[str, int]] = field(default_factory=dict)  # phase -> name -> bytes, see `snapshot`
    warmup: list[Run] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)  # eager
    bytes_per_token: int | None = None  # weights that a decode step reads, see `decode_weight_bytes`
    memory_bytes_per_s: dict[str, float] = field(default_factory=dict)  # device -> bytes/s
    bandwidth_utilization: float | None = None
    compiled: Compiled | None = None
    torch_compile_graphs: int | None = None  # that torch captured of `torch.compile(model)` as written
    prefill_tokens: int | None = None
    prefill_tokens_per_s: float | None = None
    prefill_rates: list[float] = field(default_factory=list)
    is_reference: bool = False
    quality: Quality | None = None
    notes: list[str] = field(default_factory=list)
    failure: str | None = None
    unavailable: bool = False  # the failure: this machine lacks something that it needs
    concerns_all: bool = False  # the failure is the model's or the device's, whatever the precision
    eager_complete: bool = False  # the eager model was measured to its end, so that it can be recommended
    complete: bool = False

    @property
    def name(self) -> str:
        return self.settings.weights or "none"

    @property
    def label(self) -> str:
        """What tables call it: the unquantized model by its dtype."""
        return self.name if self.settings.weights else SHORT_DTYPES.get(self.dtype, "unquantized")

    @property
    def timed_runs(self) -> list[Run]:
        """The runs that were asked for: the compiled step's under --compile, if there are any."""
        return (self.compiled and self.compiled.runs) or self.runs


@dataclass
class Benchmark:
    """What one call of the script measured: the content of its JSON file."""

    results: list[Result]
    interrupted: bool = False
    date: str = field(
        default_factory=lambda: datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    )
    version: str = __version__
    schema: int = SCHEMA

    @property
    def described(self) -> Result:
        """The first Result that knows the machine, else the first."""
        return next((r for r in self.results if r.environment), self.results[0])


def to_json(benchmark: Benchmark) -> str:
    return json.dumps(dataclasses.asdict(benchmark), ensure_ascii=False, indent=1, allow_nan=False)


NESTED = {"results": Result, "settings": Settings, "warmup": Run, "runs": Run, "compiled": Compiled,
          "quality": Quality}  # fmt: skip


def lacks_figure(kind: type, plain: dict[str, Any]) -> bool:
    """Whether a run or a judgement lacks one of the figures that it always has."""
    if kind not in (Run, Quality):
        return False
    always = [f.name for f in dataclasses.fields(kind) if f.type in ("float", "list[float]")]
    figures = [plain[name] for name in always if name in plain]
    return any(figure is None or (isinstance(figure, list) and None in figure) for figure in figures)


def from_plain(kind: type, plain: dict[str, Any]) -> Any:
    """The dataclass that `asdict` made this of, without what `lacks_figure` and without fields that a later
    version wrote; None if it lacks one itself.

    Raises TypeError or AttributeError for anything else.
    """
    if lacks_figure(kind, plain):
        return None
    known = {f.name: plain[f.name] for f in dataclasses.fields(kind) if f.name in plain}
    for name, value in known.items():
        if name in NESTED and isinstance(value, list):
            made = [from_plain(NESTED[name], item) for item in value]
            known[name] = [item for item in made if item is not None]
        elif name in NESTED and isinstance(value, dict):
            known[name] = from_plain(NESTED[name], value)
        elif name == "memory_bytes_per_s":
            known[name] = {device: speed for device, speed in value.items() if speed is not None}
    return kind(**known)


def from_json(text: str) -> Benchmark:
    """The Benchmark that `to_json` wrote. Raises Failure for a text that is none, or of another schema."""
    try:
        plain = json.loads(text)
        if plain["schema"] != SCHEMA:
            reader = READERS.get(plain["schema"], "the version that wrote it")
            raise Failure(f"has schema {plain['schema']}, which {reader} reads; this one reads {SCHEMA}")
        return from_plain(Benchmark, plain)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Failure("holds no results that this version of the script can read") from None


def write_results(path: str, benchmark: Benchmark) -> None:
    """Write all numbers atomically: a reader, or a killed process, never leaves half a file."""
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        # a question in another encoding than UTF-8 has surrogates
        temporary.write_text(to_json(benchmark) + "\n", encoding="utf-8", errors="replace")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ statistics


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): sensible near 0 and 1 and for few trials."""
    z, share = 1.96, successes / trials
    center, scale = share + z * z / (2 * trials), 1 + z * z / trials
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def student_t(freedom: float) -> float:
    """The two-sided 95 % quantile of Student's t: a table, then a series, at most 0.1 % too small."""
    table = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[max(1, int(freedom)) - 1] if freedom < 11 else 1.96 + 2.4 / freedom + 2.8 / freedom**2


def percentile(values: list[float], percent: int) -> float | None:
    """Linear interpolation between the sorted values; None without values."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is known."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def deviation(values: Iterable[float | None]) -> float | None:
    """The sample standard deviation of what is known; None for fewer than two values."""
    known = [v for v in values if v is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def decode_rate(runs: list[Run]) -> float | None:
    """Median decode tokens/s of some runs."""
    return median(r.decode_tokens_per_s for r in runs)


def rates_over_shared_prefix(*groups: list[Run]) -> list[list[float]]:
    """Each run's decode tokens/s over the positions that all runs of all groups reached, group by group.

    Sampled answers differ in length, and decode slows as the context grows, so only this compares run with
    run. Runs of fewer than MIN_RATE_TOKENS tokens do not count.
    """
    gaps = [[r.inter_token_s for r in runs if len(r.inter_token_s) >= MIN_RATE_TOKENS - 1] for runs in groups]
    shared = min((len(g) for group in gaps for g in group), default=0)
    return [[shared / sum(g[:shared]) for g in group] for group in gaps]


def coefficient_of_variation(runs: list[Run]) -> float | None:
    """Sample standard deviation of the runs' rates over their mean; None for fewer than two that count."""
    (rates,) = rates_over_shared_prefix(runs)
    return statistics.stdev(rates) / statistics.fmean(rates) if len(rates) > 1 else None


def ratio_interval(runs: list[Run], base: list[Run], distortion: float = 1.0) -> tuple[float, float] | None:
    """The 95 % interval of the ratio of two decode rates (Welch 1947, on logarithms); None for too few runs.

    `distortion` is the ratio of the two processes' memory bandwidths: it may be in the figures or not, so the
    interval is widened by it.
    """
    logs = [[math.log(rate) for rate in group] for group in rates_over_shared_prefix(runs, base)]
    if min(map(len, logs)) < 2:
        return None
    errors = [statistics.variance(group) / len(group) for group in logs]
    center = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
    error = sum(errors)
    freedom = error**2 / sum(e**2 / (len(g) - 1) for e, g in zip(errors, logs, strict=True)) if error else 1
    half = student_t(freedom) * math.sqrt(error)
    return math.exp(center - half) * min(1, 1 / distortion), math.exp(center + half) * max(1, 1 / distortion)


def distortion(r: Result, base: Result) -> float:
    """Ratio of the memory bandwidths that two processes measured, at the device where they differ most."""
    ours, theirs = r.memory_bytes_per_s, base.memory_bytes_per_s
    ratios = [ours[device] / theirs[device] for device in ours if device in theirs]
    return max(ratios, key=lambda x: abs(math.log(x)), default=1.0)


def speed_interval(r: Result, base: Result) -> tuple[float, float] | None:
    """The 95 % interval of r's eager decode rate over base's; None where it is unknown."""
    return ratio_interval(r.runs, base.runs, distortion(r, base)) if r.devices == base.devices else None


def is_about_one(interval: tuple[float, float] | None) -> bool:
    """Whether a ratio's interval holds 1 and is narrow enough to say so; a wide one says nothing."""
    return interval is not None and 1 / ABOUT <= interval[0] <= 1 <= interval[1] <= ABOUT


def judge(interval: tuple[float, float] | None, limit: float) -> str:
    """Whether a figure of this interval is at least `limit`: met, not met or too close to call."""
    if interval is None or interval[0] < limit <= interval[1]:
        return "too close to call"
    return "met" if interval[0] >= limit else "not met"


def kl_interval(q: Quality) -> tuple[float, float]:
    half = 1.96 * q.kl_standard_error if q.kl_standard_error is not None else math.inf
    return max(0.0, q.kl_divergence - half), q.kl_divergence + half


def verdict(r: Result) -> str:
    """The answers: kept, changed or broken, with "or" where KL's interval holds a limit; – if unknown."""
    if r.quality is None or r.quality.kl_standard_error is None:
        return "–"
    named = [sum(kl > limit for limit in (KL_KEPT, KL_BROKEN)) for kl in kl_interval(r.quality)]
    names = ("kept", "changed", "broken")
    return names[named[0]] if named[0] == named[1] else f"{names[named[0]]} or {names[named[1]]}"


def utilization(r: Result, runs: list[Run]) -> float | None:
    """MBU. Several devices work one after the other, so the memory's time is the sum of each one's."""
    rate = decode_rate(runs)
    held = r.device_weight_bytes
    if rate is None or r.bytes_per_token is None or not held or not set(held) <= set(r.memory_bytes_per_s):
        return None
    total = sum(held.values())
    return rate * sum(r.bytes_per_token * n / total / r.memory_bytes_per_s[d] for d, n in held.items())


def pace(runs: list[Run]) -> tuple[float, float] | None:
    """Median decode tokens/s over the first and the last tenth of long answers; None without one."""
    gaps = [r.inter_token_s for r in runs if len(r.inter_token_s) >= LONG_ANSWER_TOKENS - 1]
    tenths = [(g[: len(g) // 10], g[-(len(g) // 10) :]) for g in gaps]
    return tuple(statistics.median(len(t[i]) / sum(t[i]) for t in tenths) for i in (0, 1)) if tenths else None


def is_warming_up(rates: list[float]) -> bool:
    """Whether the first runs were slower because they were the first: never of two runs.

    Either the first run alone is a tenth slower than all others, which agree; or each run is faster than the
    one before. Three noisy runs rise by chance one time in six: of three, each step must be a large one.
    """
    if len(rates) < 3:
        return False
    first, *others = rates
    agree = statistics.stdev(others) < UNSTABLE * statistics.fmean(others)
    least = UNSTABLE if len(rates) == 3 else 0.01
    rises = all(b > (1 + least) * a for a, b in itertools.pairwise(rates))
    return (agree and first < 0.9 * min(others)) or (rises and rates[-1] > (1 + UNSTABLE) * first)


def slows_with_context(runs: list[Run]) -> bool:
    """Whether decode slows by a tenth within each of two or more long answers, and in all of them alike.

    A busy machine slows each run elsewhere.
    """
    falls = [last / first for first, last in filter(None, (pace([run]) for run in runs))]
    return len(falls) > 1 and max(falls) < 0.9 and max(falls) < 1.1 * min(falls)


def gpu_share(r: Result) -> float | None:
    """Share of an eager decode step's time in which the GPU works; None where its kernels were not timed."""
    rate = decode_rate(r.runs)
    return r.kernel_s * rate if r.kernel_s and rate else None


def joules_per_token(runs: list[Run]) -> float | None:
    """Energy of all runs on all devices by their tokens; None under a second: the counter hardly moves."""
    if not runs or any(run.energy_j is None for run in runs) or sum(run.latency_s for run in runs) < 1:
        return None
    return sum(sum(run.energy_j.values()) for run in runs) / sum(run.generated_tokens for run in runs)


def saving(r: Result) -> float | None:
    """Share of the unquantized bytes that this precision saves."""
    return 1 - r.weight_bytes / r.unquantized_bytes if r.weight_bytes and r.unquantized_bytes else None


def peak_bytes(r: Result) -> tuple[int | None, str]:
    """Peak of the runs, and of what: tensors on all devices, or RSS where torch keeps no count (CPU)."""
    peak = r.memory.get("peak of runs", {})
    allocated = [n for name, n in peak.items() if name.endswith("allocated")]
    return (sum(allocated), "tensors") if allocated else (peak.get("rss"), "RSS")


def is_float32(r: Result) -> bool:
    """Whether the unquantized model has 32 bits a parameter."""
    return bool(r.parameters and r.unquantized_bytes > 3 * r.parameters)


# ------------------------------------------------------------------------------------------------- judgements


def grave_warnings(r: Result) -> list[str]:
    """Why a precision's answers, or its figures, are not to be used; printed in red."""
    s, q = r.settings, r.quality
    found = []
    if s.weights and r.quantized_layers == 0:
        found.append("NOTHING WAS QUANTIZED: Quanto knows none of the layers; all is as stored.")
    if s.quanto_kernels and "bias" in r.defects:
        found.append(f"RUNS AS SHIPPED: {r.defects['bias'].removeprefix('as shipped, ')}.")
    if verdict(r) == "broken":
        found.append(f"BREAKS THIS MODEL (KL {format_3g(q.kl_divergence)} nats): do not use it.")
    own = r.compiled and r.compiled.quality
    least = kl_interval(q)[1] if q else 0
    if own and kl_interval(own)[0] > max(KL_KEPT, least):
        found.append(f"THE COMPILED STEP ANSWERS OTHERWISE (KL {kl_text(own)}): do not use its speed.")
    return found


def warnings_for(r: Result) -> list[str]:
    """What else a reader must know before trusting a precision's numbers, the worst first."""
    s, q = r.settings, r.quality
    found = []
    if s.random_weights:
        found.append("Random weights: speed and memory hold, text and quality mean nothing.")
    if s.weights and is_float32(r):
        found.append(
            "32-bit weights: claims on memory and speed concern 16 bit, so none is judged (--dtype bfloat16)."
        )
    if s.weights and r.quantized_layers and r.quantizable_bytes < r.unquantized_bytes / 2:
        share = percent(r.quantizable_bytes / r.unquantized_bytes)
        found.append(f"Quanto reaches only {share} % of the weights; the others stay as stored.")
    if q and q.positions < MIN_POSITIONS:
        found.append(f"Quality rests on {plural(q.positions, 'token')}, fewer than {MIN_POSITIONS}.")
    if r.timed_runs and all((run.stop_reason, run.generated_tokens) == ("eos", 1) for run in r.timed_runs):
        found.append("Every answer ended at its first token: a chat model wants --chat.")
    found += instability("eager", r.runs, bool(s.compare), (gpu_share(r) or 1) < HOST_BOUND)
    if r.compiled:
        found += instability("compiled", r.compiled.runs, bool(s.compare))
        if r.compiled.recompilations:
            found.append(f"The timed runs include {plural(r.compiled.recompilations, 'recompilation')}.")
    return found + r.notes


def instability(kind: str, runs: list[Run], same_work: bool, host_bound: bool = False) -> list[str]:
    """What is unsteady about some runs, and whether that could be judged at all."""
    found, variation = [], coefficient_of_variation(runs)
    if same_work and any(run.stop_reason == "time" for run in runs):
        found.append(f"The {kind} runs were ended by MAX_SECONDS: less work than the others did.")
    if variation is None:
        unknown = (
            f"Fewer than two {kind} runs reached {MIN_RATE_TOKENS} tokens: how steady they are is unknown."
        )
        return found + [unknown] * (len(runs) > 1)
    (rates,) = rates_over_shared_prefix(runs)
    if is_warming_up(rates):
        found.append(f"The {kind} runs are still warming up, each faster than before: more WARMUP_RUNS.")
    elif variation > UNSTABLE:
        # without the figure, which stands in the table: precisions of the same words share a line
        why = "the host, which sets the pace, is not steady." if host_bound else "is the machine busy?"
        found.append(f"The {kind} runs' rates differ by over {100 * UNSTABLE:.0f} % (s.d.): {why}")
    # never of three runs, whose extremes are at most 2 s.d. apart
    if rates[0] - rates[-1] > max(2 * variation, UNSTABLE) * statistics.fmean(rates):
        found.append(f"The last {kind} run is clearly slower than the first: heat? another program?")
    if slows_with_context(runs):
        first, last = pace(runs)
        speeds = f"{format_3g(first)} tokens/s at the beginning, {format_3g(last)} at the end"
        found.append(f"The {kind} model slows with context, alike in all runs: {speeds}.")
    return found


def comparability_warnings(results: list[Result]) -> list[str]:
    """Where the precisions were not measured alike, so that their figures are hard to compare.

    A process may get faster memory than another: on a shared virtual machine 33 to 61 GB/s, steady in each.
    """
    found = []
    placed = {r.label: ", ".join(r.devices) for r in results if r.memory}
    if len(set(placed.values())) > 1:
        each = "; ".join(f"{name} on {devices}" for name, devices in placed.items())
        found.append(f"Measured on different devices ({each}): speeds are not compared.")
    for device in dict.fromkeys(device for r in results for device in r.memory_bytes_per_s):
        speeds = [r.memory_bytes_per_s[device] for r in results if device in r.memory_bytes_per_s]
        if max(speeds) > 1.1 * min(speeds):
            span = f"{format_3g(min(speeds), 1e9)} to {format_3g(max(speeds), 1e9)} GB/s"
            found.append(f"Memory of {device} delivered {span}: the intervals of speeds are widened by it.")
    return found


@dataclass
class Expectation:
    """What introductions to Quanto tell users, what was measured here, and why it differs, if known."""

    expected: str
    of: str  # precision
    measured: str
    verdict: str  # met, not met, too close to call, unknown
    reason: str = ""


def expectations(results: list[Result]) -> list[Expectation]:
    """One per claim whose precisions were measured."""
    by_name = {r.name: r for r in results}
    base, int8, float8, int4 = map(by_name.get, ("none", "int8", "float8", "int4"))
    found = []
    if int8 and int8.weight_bytes and not is_float32(int8):
        found.append(expected_memory(int8, base))
        if base and base.devices == int8.devices and decode_rate(base.runs) and decode_rate(int8.runs):
            interval = speed_interval(int8, base)
            ratio = percent(decode_rate(int8.runs) / decode_rate(base.runs))
            measured = f"{ratio} %{span_of(interval, percent)}, both eager"
            why = "Speed: eager Quanto calls Python for every layer"
            on_cuda = int8.devices[0].startswith("cuda")
            why += (
                ", and widens 8-bit weights on every call." if on_cuda else ", which small models feel most."
            )
            found.append(
                Expectation("at least 90 % of the 16-bit speed", "int8", measured, judge(interval, 0.9), why)
            )
    for r in results:
        if r.quality and r.settings.weights:
            low, high = kl_interval(r.quality)
            said = judge((-high, -low), -KL_KEPT)
            found.append(Expectation("answers very close", r.label, f"KL {kl_text(r.quality)}", said))
    if int8 and int8.torch_compile_graphs is not None:
        found.append(expected_torch_compile(int8))
    both = [r.quality for r in (float8, int8) if r and r.quality]
    if len(both) == 2 and both[0].reference == both[1].reference:
        (low, high), (least, most) = map(kl_interval, both)
        said = judge((least - high, most - low), 0)
        measured = f"KL {kl_text(both[0])} against {kl_text(both[1])}"
        found.append(Expectation("more exact than int8", "float8", measured, said))
    if int8 and int4 and int8.weight_bytes and int4.weight_bytes:
        measured = f"{gib(int4.weight_bytes)} GiB stored against {gib(int8.weight_bytes)}"
        said = "met" if int4.weight_bytes < int8.weight_bytes else "not met"
        found.append(Expectation("less memory still than int8", "int4", measured, said))
    return found


def expected_memory(int8: Result, base: Result | None) -> Expectation:
    """Judged by the stored weights, which are exact; memory in use stands beside them."""
    used, kind = peak_bytes(int8)
    before, base_kind = peak_bytes(base) if base else (None, "")
    measured = f"{percent(saving(int8))} % of the stored weights"
    if used:
        measured += f"; peak of {kind} {gib(used)} GiB"
        measured += f" against {gib(before)}" if before and kind == base_kind else ""
    bits = 8 * int8.unquantized_bytes / int8.parameters
    most = percent(int8.quantizable_bytes / int8.unquantized_bytes * (1 - 8 / bits))
    why = f"Memory: embeddings and output layer stay as stored, so 8 bits save at most {most} % here."
    said = "met" if saving(int8) >= 0.5 else "not met"
    return Expectation("50-60 % less memory than 16 bit", "int8", measured, said, why)


def expected_torch_compile(r: Result) -> Expectation:
    """Not timed: where torch captured no graph, what ran was the model as it is."""
    claim = "model = torch.compile(model): 20-30 % faster"
    graphs = r.torch_compile_graphs
    if graphs:
        return Expectation(claim, r.label, f"{plural(graphs, 'graph')} compiled, not timed", "unknown")
    why = "torch.compile: generate() runs the module inside the wrapper, so nothing is compiled"
    return Expectation(claim, r.label, "no effect: 0 graphs compiled", "not met", f"{why} (pytorch #161743).")


def reference_of(results: list[Result]) -> str:
    """The name of the precision that the others' answers are held against."""
    return next((r.label for r in results if r.is_reference), "the reference")


def recommendation(results: list[Result]) -> list[str]:
    """The answer to "which one?", by plain rules on the figures: a comparison's first lines.

    Only what was measured to its end is recommended.
    """
    done = [r for r in results if r.eager_complete and r.weight_bytes and decode_rate(r.runs)]
    kept = [r for r in done if verdict(r) == "kept"]
    if not done:
        return []
    lines = []
    if kept:
        lines.append(recommended(kept, next((r for r in done if r.name == "none"), None)))
    elif any(r.quality for r in done):
        lines.append(f"[bold]No precision is certain to keep {reference_of(results)}'s answers.[/]")
    elif len(done) == 1 and done[0].is_reference:
        only = f"[bold]Only {reference_of(results)} was measured to its end[/]"
        lines.append(f"{only}: there is nothing to compare its answers with.")
    else:
        lines.append("[bold]Quality was not measured[/], so none is recommended.")
    if len(done) > 1 and len({tuple(r.devices) for r in done}) == 1:
        fastest = max(done, key=lambda r: decode_rate(r.runs))
        line = f"Fastest: {fastest.label} ({format_3g(decode_rate(fastest.runs))} tokens/s)"
        intervals = {r.label: speed_interval(r, fastest) for r in done if r is not fastest}
        near = [name for name, interval in intervals.items() if is_about_one(interval)]
        unsure = [
            n for n, interval in intervals.items() if n not in near and (not interval or interval[1] >= 1)
        ]
        line += f", about as fast: {', '.join(near)}" if near else ""
        line += f", possibly as fast: {', '.join(unsure)}" if unsure else ""
        smallest = min(done, key=lambda r: r.weight_bytes)
        lines.append(f"{line}. Smallest: {smallest.label} ({gib(smallest.weight_bytes)} GiB).")
    for said in dict.fromkeys(verdict(r) for r in done):
        if said not in ("kept", "–"):
            lines[-1] += f" Answers {said}: {', '.join(r.label for r in done if verdict(r) == said)}."
    unsteady = [r.label for r in done if (coefficient_of_variation(r.runs) or 0) > UNSTABLE]
    if unsteady:
        lines.append(f"[bold yellow]Unsteady: the speed of {', '.join(unsteady)}, see below.[/]")
    if left_out := [r.label for r in results if not r.eager_complete]:
        lines.append(f"[bold yellow]Not measured to the end, so left out here: {', '.join(left_out)}.[/]")
    return lines


def recommended(kept: list[Result], base: Result | None) -> str:
    """The smallest, or of those of its size the fastest; a percent of memory is no difference."""
    least = min(r.weight_bytes for r in kept)
    best = max((r for r in kept if r.weight_bytes <= 1.01 * least), key=lambda r: decode_rate(r.runs))
    rate = decode_rate(best.runs)
    line = f"[bold green]Smallest that keeps the answers: {best.label}[/], {gib(best.weight_bytes)} GiB"
    line += f" of weights ({percent(saving(best))} % saved), decode {format_3g(rate)} tokens/s"
    if base and base is not best and base.devices == best.devices:
        line += f", {format_3g(rate / decode_rate(base.runs))} times {base.label}'s speed"
        if best.prefill_tokens_per_s and base.prefill_tokens_per_s:
            slower = base.prefill_tokens_per_s / best.prefill_tokens_per_s
            link = "but" if rate > decode_rate(base.runs) else "and"
            line += f" ({link} prompts are read {format_3g(slower)} times slower)" if slower > ABOUT else ""
    if best.compiled and decode_rate(best.compiled.runs):
        line += f"; in this script's compiled step: {format_3g(decode_rate(best.compiled.runs))} tokens/s"
    return line + "."


# ---------------------------------------------------------------------------------------------------- report
# Pure: a Benchmark in; lines of rich markup and tables out.


def format_3g(value: float | None, scale: float = 1) -> str:
    """Three significant digits; a dash for the unknown."""
    if value is None:
        return "–"
    value /= scale
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".") if value else "0"


def plus_minus(value: float | None, spread: float | None, scale: float = 1) -> str:
    """A figure and its spread, "24.1 ±0.3"; the spread as fine as the figure."""
    text = format_3g(value, scale)
    if value is None or spread is None:
        return text
    decimals = len(text.partition(".")[2])
    return f"{text} ±{spread / scale:.{decimals}f}"


def plural(number: int, noun: str) -> str:
    """ "1 run", "5 runs"."""
    return f"{number} {noun}" + "s" * (number != 1)


def gib(value: float | None) -> str:
    return format_3g(value, 2**30)


def percent(value: float | None) -> str:
    return format_3g(value, 0.01)


def duration(seconds: float) -> str:
    """ "45 s", "12 min"."""
    return f"{max(1, seconds):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def span_of(interval: tuple[float, float] | None, form: Callable[[float], str]) -> str:
    """The ends of a ratio's interval behind a figure; none where the runs differ too much to say anything."""
    if not interval or interval[1] > 10 * interval[0]:
        return ""
    return f" ({form(interval[0])} to {form(interval[1])})"


def kl_text(q: Quality | None) -> str:
    if q is None or q.kl_standard_error is None:
        return format_3g(q and q.kl_divergence)
    return f"{format_3g(q.kl_divergence)} ±{q.kl_standard_error:.2g}"


def rate_text(runs: list[Run]) -> str:
    """The median decode rate and its spread."""
    rate, variation = decode_rate(runs), coefficient_of_variation(runs)
    return plus_minus(rate, variation * rate if rate and variation is not None else None)


def spread_text(values: Iterable[float | None], scale: float = 1) -> str:
    """The median of what is known and its spread."""
    known = list(values)
    return plus_minus(median(known), deviation(known), scale)


def table(title: str, columns: Iterable[str], rows: list[list[str]], left: int = 1) -> list[Any]:
    """A title and a table with Markdown borders; the first `left` columns are text, the others numbers."""
    made = Table(box=box.MARKDOWN, header_style="none")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return [f"[bold]### {title}[/]", made]


def bars(values: list[float | None], texts: list[str], best: float | None = None) -> list[str]:
    """Each text behind a bar of its figure's size; that of the best figure is green."""
    largest = max((v for v in values if v), default=0)
    width = max(map(len, texts), default=0)
    cells = []
    for value, text in zip(values, texts, strict=True):
        length = max(1, round(4 * value / largest)) if value else 0
        style = "green" if value and value == best else "cyan"
        cells.append(f"[{style}]{'█' * length}[/]{' ' * (4 - length)} {text:>{width}}")
    return cells


def report(benchmark: Benchmark) -> list[Any]:
    """The whole report of what was measured, a single precision or a comparison."""
    results = benchmark.results
    first = benchmark.described
    compared = bool(first.settings.compare)
    compiled = any(r.compiled for r in results)
    parts = [heading(first), *(recommendation(results) if compared else single_headline(first)), ""]
    for block in (hardware(first), alerts(benchmark)):
        parts += [*block, ""] if block else []
    parts += speed_table(results) + host_bound(results)
    parts += speed_table(results, compiled=True) if compiled else []
    if compared:
        parts += comparison_memory(results) + comparison_quality(results)
    else:
        parts += runs_table(first) + memory_table(first)
    return parts + expected_table(results) + kernel_lines(results) + answers(results)


def heading(r: Result) -> str:
    s = r.settings
    size = f", {format_3g(r.parameters, 1e9)} B parameters" if r.parameters else ""
    form = ("comparison" if s.compare else r.label) + (", eager and compiled" if s.compile else "")
    place = f", on {', '.join(r.devices)}" if r.devices else ""
    return f"[bold]# {escape(s.model_name)}: {form}[/]{size}{place}"


def single_headline(r: Result) -> list[str]:
    """The most important figures in one plain sentence."""
    if not r.timed_runs or r.weight_bytes is None:
        return []
    rate, ttft = decode_rate(r.timed_runs), median(run.ttft_s for run in r.timed_runs)
    how = " in this script's compiled step" if r.timed_runs is not r.runs else ""
    parts = [f"{format_3g(rate)} tokens/s{how}" if rate else "no speed (answers of one token)"]
    parts += [f"first token after {format_3g(ttft)} s", f"weights {format_3g(r.weight_bytes, 1e6)} MB"]
    if r.settings.weights:
        parts.append(f"{percent(saving(r))} % less than {SHORT_DTYPES.get(r.dtype, 'unquantized')}")
    return [f"[bold green]{r.label}:[/] {', '.join(parts)}."]


def hardware(r: Result) -> list[str]:
    """Hardware and versions."""
    machine = {key for key in r.environment if key in ("cpu", "ram") or key in r.devices}
    versions = [f"{key} {text}" for key, text in r.environment.items() if key not in machine]
    parts = "; ".join(text for key, text in r.environment.items() if key in machine)
    return [escape(line) for line in (parts, ", ".join(versions)) if line]


def alerts(benchmark: Benchmark) -> list[str]:
    """What failed, and what a reader must know; a warning names its precisions unless it is everyone's."""
    results = benchmark.results
    lines = []
    grave, said = {}, {}
    compared = bool(results[0].settings.compare)
    if benchmark.interrupted:
        lines.append("[bold yellow]! Interrupted: this is what had been measured.[/]")
    for r in results:
        if r.failure:
            what = "--compile " * bool(r.settings.compile and r.eager_complete)  # the eager rows are whole
            what += ("unavailable" if r.unavailable else "FAILED") + f": {escape(r.failure)}"
            lines.append(f"[bold red]{f'{r.label} ' * compared}{what}[/]")
        for text in grave_warnings(r):
            grave.setdefault(text, []).append(r.label)
        for text in warnings_for(r):
            said.setdefault(text, []).append(r.label)
    for style, told in (("red", grave), ("yellow", said)):
        for text, labels in told.items():
            whose = f"{', '.join(labels)}: " if len(labels) < len(results) else ""
            lines.append(f"[bold {style}]! {whose}{escape(text)}[/]")
    if compared:
        lines += [f"[bold yellow]! {escape(text)}[/]" for text in comparability_warnings(results)]
    return lines


def row_label(r: Result, compiled: bool = False) -> str:
    """A row's name, marked if what it shows failed or was not finished."""
    if r.complete or (r.eager_complete and not compiled):
        return r.label
    return f"{r.label} [red]✗[/]" if r.failure else f"{r.label} [yellow]…[/]"


def speed_table(results: list[Result], compiled: bool = False) -> list[Any]:
    """Speeds, eager or in the compiled step."""
    groups = [(r.compiled.runs if r.compiled else []) if compiled else r.runs for r in results]
    if not any(groups):
        return []
    rates = [decode_rate(runs) for runs in groups]
    rows = []
    drawn = bars(rates, [rate_text(runs) for runs in groups], max(filter(None, rates), default=None))
    base = next((r for r, rate in zip(results, rates, strict=True) if rate and r.name == "none"), None)
    energy = compiled and any(joules_per_token(runs) for runs in groups)
    for r, runs, rate, cell in zip(results, groups, rates, drawn, strict=True):
        row = [row_label(r, compiled), cell]
        measured = r.compiled if compiled else r
        if base:
            alike = rate and r.devices == base.devices
            row.append(format_3g(rate / rates[results.index(base)]) if alike else "–")
        if compiled:
            eager = decode_rate(r.runs)
            row.append(format_3g(rate / eager) if rate and eager else "–")
            row.append(format_3g(measured and measured.seconds))
        else:
            row.append(plus_minus(r.prefill_tokens_per_s, deviation(r.prefill_rates)))
            row.append(spread_text([run.ttft_s for run in runs], 0.001))
        row.append(percent(measured and measured.bandwidth_utilization))
        rows.append(row + [format_3g(joules_per_token(runs))] * energy)
    columns = ["weights", "decode tok/s", *["speed-up"] * bool(base)]
    columns += ["x eager", "compile s"] if compiled else ["prefill tok/s", "TTFT ms"]
    return table(speed_title(results, groups, compiled), [*columns, "MBU %", *["J/tok"] * energy], rows)


def speed_title(results: list[Result], groups: list[list[Run]], compiled: bool) -> str:
    """What the speeds are of; counts are of the runs made, not of those asked for."""
    counts = sorted({len(runs) for runs in groups if runs} or {0})
    tokens = max((run.generated_tokens for runs in groups for run in runs), default=0)
    made = f"{counts[0]} to {counts[-1]} runs" if len(counts) > 1 else plural(counts[0], "run")
    title = next((r.compiled.way for r in results if r.compiled), "") if compiled else "Speed, eager"
    return f"{title[:1].upper()}{title[1:]}: medians of {made} of up to {plural(tokens, 'new token')}"


def host_bound(results: list[Result]) -> list[str]:
    """How much of an eager decode step the GPU works: where that is little, the host's speed is measured."""
    shares = {r.label: gpu_share(r) for r in results}
    known = ", ".join(f"{label} {percent(share)} %" for label, share in shares.items() if share)
    if not known:
        return []
    line = f"GPU at work during an eager step: {known}"
    if min(filter(None, shares.values())) < HOST_BOUND:
        line += "; for the rest it waits for Python on the host, whose speed this is."
    return [line.rstrip(".") + ".", ""]


def runs_table(r: Result) -> list[Any]:
    """A line a run, eager ones before compiled ones, and what describes all timed ones of the last kind."""
    runs = r.timed_runs
    if not runs:
        return []
    columns, rows = ("run", "ended by", "tokens", "TTFT ms", "decode tok/s", "latency s", "J"), []
    kinds = ("eager ", "compiled ") if runs is not r.runs else ("",)
    numbered = []
    for kind, measured in zip(kinds, (r, r.compiled), strict=False):
        warm = f"last of {len(measured.warmup)}"
        numbered += [(f"{kind}warm", warm, run) for run in measured.warmup[-1:]]
        numbered += [(f"{kind}{i + 1}", run.stop_reason, run) for i, run in enumerate(measured.runs)]
    for name, ended, run in numbered:
        joules = sum(run.energy_j.values()) if run.energy_j and run.latency_s >= 1 else None
        rest = format_3g(run.decode_tokens_per_s), format_3g(run.latency_s), format_3g(joules)
        rows.append([name, ended, str(run.generated_tokens), format_3g(run.ttft_s, 0.001), *rest])
    used = ", ".join(f"{key} {value}" for key, value in r.generation.items() if value is not None)
    title = f"Runs: {runs[0].prompt_tokens} prompt tokens ({used})"
    facts = [f"{kinds[-1]}latency {spread_text(run.latency_s for run in runs)} s".capitalize()]
    facts += [f"{spread_text(run.tokens_per_s for run in runs)} tokens/s of the whole call"]
    if gaps := [gap for run in runs for gap in run.inter_token_s]:
        shown = ", ".join(format_3g(percentile(gaps, p), 0.001) for p in (50, 90, 99))
        facts.append(f"inter-token {shown} ms (p50, p90, p99)")
    if rates := pace(runs):
        facts.append(f"pace {' → '.join(map(format_3g, rates))} tokens/s from the first to the last tenth")
    if r.memory_bytes_per_s:
        delivers = format_3g(min(r.memory_bytes_per_s.values()), 1e9)
        facts.append(f"this device's memory delivers {delivers} GB/s")
    return [*table(title, columns, rows, left=2), "; ".join(facts) + ".", ""]


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
    return [*parts, *step, f"{stored}. Loaded in {format_3g(r.load_s)} s.", quantized + ".", ""]


def comparison_memory(results: list[Result]) -> list[Any]:
    """Stored weights, and the peak of tensors or, without torch's count, of RSS; energy has room here."""
    sizes = [r.weight_bytes for r in results]
    peaks = [peak_bytes(r) for r in results]
    rows = []
    kinds = {kind for size, kind in peaks if size}
    joules = [joules_per_token(r.runs) for r in results]
    for i, (r, cell) in enumerate(zip(results, bars(sizes, [*map(gib, sizes)]), strict=True)):
        peak, kind = peaks[i]
        shown = gib(peak) + (f" {kind}" if peak and len(kinds) > 1 else "")
        row = [row_label(r), cell, percent(saving(r)), shown, format_3g(r.load_s)]
        rows.append(row + [format_3g(joules[i])] * any(joules))
    title = f"Memory in GiB (peak of runs: {' or '.join(sorted(kinds)) or 'unknown'})"
    columns = ("weights", "stored", "saved %", "peak", "load s", *["eager J/tok"] * any(joules))
    said = "RSS counts libraries and freed memory too, so it hides what a small model saves:"
    said += " go by what is stored."
    return table(title, columns, rows) + ([said, ""] if "RSS" in kinds else [])


def comparison_quality(results: list[Result]) -> list[Any]:
    """How far each precision's answers are from the reference's."""
    colours = {"kept": "green", "changed": "yellow", "broken": "bold red", "reference": "dim", "–": "dim"}
    rows, positions = [], max((r.quality.positions for r in results if r.quality), default=0)
    for r in results:
        q, said = r.quality, "reference" if r.is_reference else verdict(r)
        share = f"{q.same_top_token * 100:.0f} ({q.low * 100:.0f}–{q.high * 100:.0f})" if q else "–"
        answers = f"[{colours.get(said, 'yellow')}]{said}[/]"
        rows.append([row_label(r), kl_text(q), format_3g(q and q.kl_p99), share, answers])
    title = f"Answers against {reference_of(results)}'s, {plural(positions, 'token')}"
    if not any(r.is_reference and r.name == "none" for r in results):
        title += ", the most precise one that ran"
    columns = ("weights", "KL nats", "KL p99", "same top token %", "answers")
    judged = [(r.label, r.compiled.quality) for r in results if r.compiled and r.compiled.quality]
    each = ", ".join(f"{label} {kl_text(q)}" for label, q in judged)
    step = [f"KL of the compiled step's answers: {each}."] if judged else []
    limits = f"This script's limits: kept up to a KL of {KL_KEPT}, changed up to {KL_BROKEN}, broken above."
    return [*table(title, columns, rows), limits, *step, ""] if positions else []


def expected_table(results: list[Result]) -> list[Any]:
    """What introductions to Quanto tell users to expect, against what was measured here."""
    marks = {"met": "[green]✓ met[/]", "not met": "[red]✗ not met[/]"}
    rows, reasons = [], []
    for e in expectations(results):
        rows.append([e.expected, e.of, e.measured, marks.get(e.verdict, f"[yellow]? {e.verdict}[/]")])
        reasons += [e.reason] if e.reason and e.verdict == "not met" else []
    if not rows:
        return []
    title = "Expected of Quanto, and measured"
    columns = ("expected", "of", "measured", "verdict")
    return table(title, columns, rows, left=4) + reasons + [""] * bool(reasons)


def kernel_lines(results: list[Result]) -> list[Any]:
    """Which matrix products one eager decode step really called, and what Quanto as shipped would do here."""
    lines = []
    for r in results:
        if r.kernels:
            calls = ", ".join(f"{count} {name}" for name, count in r.kernels.items())
            lines.append(escape(f"{r.label}: {calls}"))
        mended = "" if r.settings.quanto_kernels else " (mended here)"
        lines += [escape(f"{r.label}: {text}{mended}") for text in r.defects.values()]
    lines += cudnn_lines(results)
    return ["[bold]### Kernels of one eager decode step[/]", "", *lines, ""] if lines else []


def cudnn_lines(results: list[Result]) -> list[str]:
    """What torch's choice of cuDNN's attention costs a program that leaves it on, where that was seen."""
    seen = [(r.label, r.cudnn_attention_s) for r in results if r.cudnn_attention_s]
    costs = [
        f"{label} {format_3g(cost['first'], 0.001)} instead of {format_3g(cost['again'], 0.001)}"
        for label, cost in seen
        if cost["first"] > PLANNING * cost["again"]
    ]
    if not costs:
        return []
    line = "As shipped, torch plans cuDNN's attention anew at every context length that a process has not had"
    line += f" before, ms a token: {'; '.join(costs)} (switched off here)."
    return [line, "Your own program wants torch.backends.cuda.enable_cudnn_sdp(False)."]


def answers(results: list[Result]) -> list[Any]:
    """The beginning of each precision's first answer."""
    most = 200 if len(results) > 1 else 400
    rows = []
    for r in results:
        text = " ".join((r.timed_runs[0].text if r.timed_runs else "").split())
        text = text.rstrip("\ufffd")  # half a character, cut by the end
        rows += [[r.label, escape(text[:most] + "…" * (len(text) > most))]] if text else []
    sampled = len(results) > 1 and results[0].settings.do_sample
    title = "The first answers begin" + " (sampled: each differs in wording)" * sampled
    return table(title, ("weights", "answer"), rows, left=2) if rows else []


def file_facts(benchmark: Benchmark) -> dict[str, Any]:
    """What a file's figures depend on: date, script, devices, versions and settings."""
    first = benchmark.described
    known = {"date": benchmark.date, "qwquanto": benchmark.version, "devices": ", ".join(first.devices)}
    settings = {key.upper(): value for key, value in dataclasses.asdict(first.settings).items()}
    for own in ("WEIGHTS", "RESULTS", "REPORT"):
        del settings[own]
    return known | first.environment | settings


def against(r: Result, base: Result) -> list[str]:
    """How a saved result stands to another one: speed, the compiled step's speed, peak of memory and KL.

    Bandwidths widen the interval of speeds on one machine alone: between two, they are the difference.
    """
    widened = distortion(r, base) if hardware(r)[:1] == hardware(base)[:1] else 1.0

    def speed(runs: list[Run], base_runs: list[Run]) -> str:
        if not (ratio := ratio_interval(runs, base_runs, widened)):
            return "–"
        return (
            "about the same" if is_about_one(ratio) else f"{format_3g(ratio[0])} to {format_3g(ratio[1])} x"
        )

    steps = [one.compiled.runs if one.compiled else [] for one in (r, base)]
    cells = [speed(r.runs, base.runs), speed(*steps), "–", "–"]
    peak, kind = peak_bytes(r)
    before, base_kind = peak_bytes(base)
    if peak and before and kind == base_kind:
        cells[2] = f"{format_3g(peak / before)} x"
    if r.quality and base.quality and r.quality.reference == base.quality.reference:
        low, high = kl_interval(r.quality)
        least, most = kl_interval(base.quality)
        cells[3] = "less" if high < least else "more" if low > most else "about the same"
    return cells


def files_report(files: list[str], benchmarks: list[Benchmark]) -> list[Any]:
    """What differs between saved files, and a table of their results."""
    names = [Path(file).stem for file in files]
    names = [escape(name) for name in (names if len(set(names)) == len(names) else files)]
    facts = [file_facts(b) for b in benchmarks]
    lines = []
    rows = []
    for key in dict.fromkeys(key for known in facts for key in known):
        values = [escape(str(known.get(key, "–"))) for known in facts]
        if len(set(values)) > 1:
            lines.append(f"{key}: {'; '.join(map(' '.join, zip(names, values, strict=True)))}")
    first = {r.name: r for r in benchmarks[0].results}
    other = benchmarks[0].results[0]
    changes: list[list[str]] = []
    for name, benchmark in zip(names, benchmarks, strict=True):
        for r in benchmark.results:
            rates = [rate_text(r.runs), rate_text(r.compiled.runs if r.compiled else [])]
            sizes = [gib(r.weight_bytes), gib(peak_bytes(r)[0])]
            base = first.get(r.name, other)
            rows.append([f"{name} {row_label(r)}", *rates, *sizes, kl_text(r.quality)])
            changes += [[f"{name} {r.label}", *against(r, base)]] if r is not base else []
    columns = ("result", "decode tok/s", "compiled", "weights", "peak", "KL nats")
    parts = table("Decode eager and compiled, memory in GiB, answers", columns, rows)
    if changes:
        new = any(r.name not in first for b in benchmarks for r in b.results)
        title = f"Against the same WEIGHTS in {names[0]}" + f", or its {other.label}" * new
        title += "; speeds as 95 % intervals"
        parts += table(title, ("result", "eager speed", "compiled speed", "peak", "KL"), changes, left=5)
    for name, file, benchmark in zip(names, files, benchmarks, strict=True):
        if said := alerts(benchmark):
            told = f"{plural(len(said), 'warning')} with these figures: --show {escape(file)}"
            lines.append(f"[bold yellow]! {name}: {told}[/]")
    return ["[bold]# Saved results, and what differs between them[/]", "", *lines, "", *parts]


def render(parts: list[Any], file: Any) -> None:
    """Print a report: coloured and wrapped in a terminal, uncut anywhere else."""
    console = Console(file=file, highlight=False, emoji=False)  # an answer's :key: is no emoji
    console.width = console.width if console.is_terminal else 100_000
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    print(*(line.rstrip() for line in captured.get().splitlines()), sep="\n", file=file)


def save_report(parts: list[Any], path: str | None, title: str) -> list[str]:
    """The report as a picture (.svg) or a page (.html), if a path is given; what could not be written."""
    if not path:
        return []
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=110, file=nowhere, highlight=False, emoji=False)
        console.print(*parts, sep="\n")
    try:
        console.save_svg(path, title=title) if path.endswith(".svg") else console.save_html(path)
    except OSError as error:
        return [f"cannot write {path}: {error.strerror or error}"]
    return []


# --------------------------------------------------------------------------------------------------- workers


class LastingStream:
    """Standard error, whose reader may go: a closed terminal must not end a measurement."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError:
            discard(self.stream)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            discard(self.stream)


def discard(stream: Any) -> None:
    """What is written to a stream, and what it still holds, goes nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Interruption:
    """Ctrl-C, SIGTERM or SIGHUP, remembered: nothing is raised, the worker is ended, its figures stand.

    A signal that was ignored stays so: SIGHUP after `nohup`, Ctrl-C in the background of a plain sh.
    """

    def __init__(self) -> None:
        self.seen = False
        self.process = None
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self)

    def __call__(self, *_: Any) -> None:
        self.seen = True
        if self.process:
            kill_group(self.process)

    def watch(self, process: subprocess.Popen) -> None:
        """The process that an interruption ends from now on; at once, if it came before."""
        self.process = process
        if self.seen:
            kill_group(process)


def kill_group(process: subprocess.Popen) -> None:
    """End a worker and all that it started."""
    with contextlib.suppress(OSError):  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()


class View:
    """Progress on standard error: lines that stay and, on a terminal, a status with its time."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        # half of rich's own rate: drawing takes half a millisecond from the runs each time
        options = {"transient": True, "refresh_per_second": 5, "disable": not self.console.is_terminal}
        self.progress = Progress(*columns, console=self.console, **options)
        self.task = self.progress.add_task("starting")
        self.prefix = ""

    def log(self, text: str) -> None:
        self.console.print(self.prefix + text, markup=False, soft_wrap=not self.console.is_terminal)

    def status(self, text: str, fraction: float | None = None) -> None:
        drawn = f"{'█' * round(10 * fraction):░<10} " if fraction is not None else ""
        self.progress.update(self.task, description=drawn + self.prefix + text)


def read_lines(stream: Any, lines: queue.Queue) -> None:
    """Everything that a worker says, then None."""
    for line in stream:
        lines.put(line)
    lines.put(None)


def start_worker(
    job: dict[str, Any], errors: Any, stop: Interruption
) -> tuple[subprocess.Popen, queue.Queue]:
    """This script as a worker in a session of its own, which Ctrl-C does not reach; and what it says."""
    quiet = {
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "critical",
        "TOKENIZERS_PARALLELISM": "false",
        "KINETO_LOG_LEVEL": "6",  # torch's profiler, whose lines would pass for the last words of a crash
    }
    new_group = {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x200}
    process = subprocess.Popen(
        [sys.executable, __file__, "--worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if job["debug"] else errors,
        encoding="utf-8",
        env=({} if job["debug"] else quiet) | os.environ,
        **new_group,
    )
    stop.watch(process)
    lines: queue.Queue = queue.Queue()
    threading.Thread(target=read_lines, args=(process.stdout, lines), daemon=True).start()
    with contextlib.suppress(OSError):  # it has died already, and says how
        # left open: its end tells the worker that this process is gone
        os.write(process.stdin.fileno(), (json.dumps(job) + "\n").encode())
    return process, lines


def follow(
    lines: queue.Queue, result: Result, view: View, save: Callable[[Result], None]
) -> tuple[Result, str | None]:
    """Pass on what a worker says until it ends: its last Result, and a failure if it fell silent instead."""
    step = "importing torch and transformers"
    limit = SILENCE_S
    heard = time.monotonic()
    view.status(step)
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            silent = time.monotonic() - heard
            ended = result.complete or result.failure
            if ended and silent > EXIT_S:
                return result, None
            if not ended and limit is not None and silent > limit:
                return result, f'said nothing for {duration(limit)} after "{step}", and was ended'
            continue
        if line is None:
            return result, None
        heard, unknown = time.monotonic(), []
        try:
            message = json.loads(line, parse_constant=unknown.append)  # NaN and infinities become None
        except ValueError:  # it was killed in the middle of a line
            continue
        if "result" in message:
            result = from_plain(Result, message["result"])
            result.notes += [NO_NUMBER] * bool(unknown)
            save(result)
        elif "log" in message:
            view.log(message["log"])
        else:
            step, limit = message["status"], message["timeout_s"]
            view.status(step, message["fraction"])


def run_worker(
    s: Settings,
    reference: str | None,
    view: View,
    save: Callable[[Result], None],
    stop: Interruption,
    debug: bool,
    folder: str | None = None,
) -> Result:
    """Measure one precision in a process of its own; `save` gets its Result whenever it has grown.

    `folder` has the model's files, if another worker got them already.

    However the process ends, the Result holds what it had said, and one line about the end if it was no good
    one. A Result marked complete is complete whatever the process does afterwards.
    """
    job = {"settings": dataclasses.asdict(s), "folder": folder, "reference": reference, "debug": debug}
    job["on_terminal"] = view.console.is_terminal
    with tempfile.TemporaryFile() as errors:
        process, lines = start_worker(job, errors, stop)
        result, failure = follow(lines, Result(s), view, save)
        if not (failure or result.complete or result.failure):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_S)
        kill_group(process)
        code = process.wait()
        stop.process = None
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
    if not result.complete and not stop.seen:
        result.failure = result.failure or failure or describe_exit(code, *said)
        save(result)
    return result


def describe_exit(code: int, said: str = "") -> str:
    """A worker's exit code in words, with the last line that it wrote to standard error."""
    if "No module named" in said:
        return f"{said}: pip install -r requirements.txt"
    said = f" ({said[:300]})" if said else ""
    if code >= 0:
        return f"its process ended with exit code {code}{said}"
    names = {number.value: number.name for number in signal.Signals}
    name = names.get(-code, f"signal {-code}")  # a real-time signal has no name
    return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else said)


def measure_all(
    s: Settings, save: Callable[[Result], None], view: View, stop: Interruption, debug: bool
) -> None:
    """Measure each precision in a worker of its own, the unquantized model first; or the one asked for."""
    if not s.compare:
        run_worker(s, None, view, save, stop, debug)
        return
    names = sorted((p or "none" for p in s.compare), key=PRECISIONS.index)
    began = time.monotonic()
    both = " eager, and the same of the compiled step" if s.compile else ""
    view.log(
        f"{', '.join(names)}: {plural(s.runs, 'run')} each{both}; the time to go follows after the first"
    )
    folder = None  # asked of the Hub once: a push in between would compare two revisions
    with tempfile.TemporaryDirectory(prefix="qwquanto-") as reference:
        for i, name in enumerate(names):
            view.prefix = ""
            rest = f", about {duration((time.monotonic() - began) / i * (len(names) - i))} to go" if i else ""
            view.log(f"{name} ({i + 1} of {len(names)}{rest})")
            view.prefix = f"{name}: "
            mine = dataclasses.replace(s, weights=None if name == "none" else name)
            result = run_worker(mine, reference, view, save, stop, debug, folder)
            folder = folder or result.folder
            if stop.seen or result.concerns_all:
                return


# ------------------------------------------------------------------------------------------------------ main


def print_report(s: Settings, benchmark: Benchmark) -> list[str]:
    """Save the report's picture and print it; what could not be written."""
    out = sys.stderr if s.results == "-" else sys.stdout
    problems, parts = [], []
    if any(r.memory for r in benchmark.results):
        parts = report(benchmark)
        problems += save_report(parts, s.report, f"python qwquanto.py, {s.model_name}")
    else:
        problems += dict.fromkeys(r.failure for r in benchmark.results if r.failure)
    try:
        if parts:
            render(parts, out)
        if s.results == "-":
            print(to_json(benchmark))
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        if error.errno not in (errno.EPIPE, errno.EIO):  # `| head` has seen enough; a terminal that is closed
            problems.append(f"cannot write to standard output: {error.strerror or error}")
    return problems


def show(files: list[str], picture: str | None = None) -> int:
    """Report saved results: one file as it was printed, several as one table; also as a picture."""
    benchmarks = []
    for file in files:
        try:
            benchmarks.append(from_json(Path(file).read_text(encoding="utf-8")))
            if not benchmarks[-1].results:
                raise Failure("holds no results")
        except (OSError, UnicodeDecodeError, Failure) as error:
            print(f"qwquanto: {file}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            return 2
    parts = report(benchmarks[0]) if len(files) == 1 else files_report(files, benchmarks)
    render(parts, sys.stdout)
    problems = save_report(parts, picture, " ".join(["python qwquanto.py --show", *files]))
    print(*problems, sep="\n", end="\n" * bool(problems), file=sys.stderr)
    return len(problems)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 for a failure, 2 for impossible settings, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # the report has Chinese and bars, whatever the locale
        stream.reconfigure(encoding="utf-8", errors="replace")
    s, args = parse(argv)
    # saved results need none of the settings but where a picture of them goes
    problems = check(s) + unused(s, args.given)
    if problems := [problem for problem in problems if problem.startswith("REPORT ") or not args.show]:
        print(*(f"qwquanto: {problem}" for problem in problems), sep="\n", file=sys.stderr)
        return 2
    if args.show:
        return show(args.show, s.report)
    stop, benchmark, unwritten = Interruption(), Benchmark([]), []

    def save(result: Result | None = None) -> None:
        """Take a Result in place of its former self, and write them all."""
        if result:
            benchmark.results[:] = [r for r in benchmark.results if r.name != result.name] + [result]
        if s.results in (None, "-") or not benchmark.results:
            return
        try:
            write_results(s.results, benchmark)
            unwritten.clear()
        except OSError as error:
            unwritten[:] = [f"cannot write {s.results}: {error.strerror or error}"]

    view = View()
    with view.progress:
        try:
            measure_all(s, save, view, stop, args.debug)
        except OSError as error:
            place = f"the temporary folder is {tempfile.gettempdir()}, TMPDIR sets another"
            unwritten.append(f"cannot start a worker: {error.strerror or error} ({place})")
    benchmark.interrupted = stop.seen
    save()
    problems = print_report(s, benchmark) + unwritten
    if stop.seen:
        measured = any(r.memory for r in benchmark.results)
        problems.append("interrupted" + ("; the report holds what was finished" if measured else ""))
    for problem in problems:
        print(f"qwquanto: {problem}", file=sys.stderr)
    failed = any(r.failure and not (r.unavailable and s.compare) for r in benchmark.results)
    return 130 if stop.seen else int(bool(problems) or failed)


if __name__ == "__main__" and "--worker" not in sys.argv:  # here, so that the program never imports torch
    sys.stderr = LastingStream(sys.stderr)
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`: whoever read has seen enough
        discard(sys.stdout)
        sys.exit(0)

# ===========================================================================================================
# PART 2: the worker. Loads and measures one precision, and says all it learns to the program in JSON lines.
# ===========================================================================================================

CHANNEL = None  # where a worker speaks; nowhere, if this file is imported
STEP_TIMEOUT_S: float | None = SILENCE_S  # of the step under way, see `step`


def listen_to_parent(jobs: queue.Queue) -> None:
    """Hand on the job, then wait for the parent's end: no orphan keeps a GPU."""
    if line := sys.stdin.readline():
        jobs.put(json.loads(line))
    sys.stdin.read()
    if os.name == "posix":
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    # standard output becomes the channel, and whatever a library prints goes to standard error
    CHANNEL = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    JOBS: queue.Queue = queue.Queue()
    threading.Thread(target=listen_to_parent, args=(JOBS,), daemon=True).start()

import copy
import io
import platform
import traceback
import types
import warnings
from importlib.metadata import version

import huggingface_hub
import numpy as np
import optimum.quanto
import psutil
import pynvml
import safetensors
import torch
import transformers
from optimum.quanto.library import qbytes_mm
from optimum.quanto.library.extensions import extension
from optimum.quanto.tensor.optimizers import AbsmaxOptimizer
from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor
from optimum.quanto.tensor.weights.qbytes import WeightQBytesTensor
from optimum.quanto.tensor.weights.tinygemm.qbits import (
    TinyGemmQBitsLinearFunction,
    TinyGemmWeightQBitsTensor,
)
from torch._inductor.custom_graph_pass import CustomGraphPass
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, QuantoConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_utils import get_state_dict_dtype, load_state_dict
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU that Triton knows
    triton = None

# A warm-up run lasts until it has reached both, and all of them so long: a GPU machine is slow at first.
WARMUP_TOKENS, WARMUP_S = 16, 5
PREFILL_TOKENS, PREFILL_S = 512, 10  # as llama-bench's pp512; seconds after which it is measured no more
GENERATION = (  # the settings of generate() that the report names
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "eos_token_id",
)  # fmt: skip
PLANNED_TOKENS = 24  # to see what cuDNN's attention costs: two seconds
CPU_BUSY_PERCENT = 20  # of the processor that others may use before it deserves a warning
SMALLER = "ask for fewer tokens, or take a smaller model"
TORCH_COMPILE_S = 300  # that torch.compile(model) may be silent, for the day when it compiles
ACTIVATION_SCALES = ("input_scale", "output_scale")  # of a Quanto layer; activations are not quantized here
QWEN2_5_3B = {  # config.json of Qwen/Qwen2.5-3B, so that --random-weights needs no network
    "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "max_window_layers": 36,
    "use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151643, "dtype": "bfloat16",
}  # fmt: skip


def send(**message: Any) -> None:
    """A line to the program."""
    if CHANNEL:
        CHANNEL.write(json.dumps(message) + "\n")
        CHANNEL.flush()


def log(text: str) -> None:
    """A line of progress for good."""
    send(log=text)


def status(text: str, fraction: float | None = None) -> None:
    """A line of progress that the next one replaces; `fraction` of the work is done."""
    send(status=text, fraction=fraction, timeout_s=STEP_TIMEOUT_S)


def reading_status(title: str) -> None:
    """Says that a prompt is being read: as with loading, that takes as long as it takes.

    But not in a step with a limit of its own, within which torch may compile.
    """
    limit = None if STEP_TIMEOUT_S == SILENCE_S else STEP_TIMEOUT_S
    send(status=f"{title}: reading the prompt", fraction=None, timeout_s=limit)


def save(result: Result) -> None:
    """Hand on what has been measured so far, so that nothing of it can be lost."""
    send(result=dataclasses.asdict(result))


@contextlib.contextmanager
def step(doing: str, timeout_s: float | None = SILENCE_S) -> Iterator[None]:
    """A part of the measurement: its status line, how long it may be silent, the place of an error in it."""
    global STEP_TIMEOUT_S
    STEP_TIMEOUT_S = timeout_s
    status(doing)
    try:
        yield
    except Exception as error:
        error.step = getattr(error, "step", doing)
        raise


def first_line(error: BaseException) -> str:
    """An exception's own words, cut to a line."""
    lines = str(error).strip().splitlines() or [""]
    return (lines[0] or type(error).__name__)[:300].rstrip(".: ")


# --------------------------------------------------------------------------------------------------- devices


# Another kind of device concerns, besides this section: Settings, `memory_of`, `snapshot`, `set_up` (its
# cache), the clock of `generate`, OUT_OF_MEMORY, INT4_ROWS, and of the compiled step PerChannelLinear,
# `window_attention` and DecodeStep.


def choose_devices(wanted: str) -> tuple[list[str], list[str]]:
    """(devices, notes): the first working device that `wanted` (DEVICE) allows and its kind's after it.

    Raises Failure where there is none.
    """
    notes = []
    has_cuda = torch.cuda.is_available()
    if wanted != "cpu" and not has_cuda:
        with contextlib.suppress(pynvml.NVMLError):  # no driver
            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
            build = torch.__version__
            cure = "for +cpu, pip install torch --index-url https://download.pytorch.org/whl/cu130; otherwise"
            cure += " the driver is too old, or CUDA_VISIBLE_DEVICES hides the GPU"
            notes.append(f"NVIDIA's driver sees {gpu}, but this torch ({build}) cannot use it: {cure}")
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count() if has_cuda else 0)]
    found += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    candidates = [device for device in found if wanted in ("auto", device, torch.device(device).type)]
    if not candidates:
        raise Failure(f"there is no device {wanted} here (found: {', '.join([*found, *notes])})")
    for i, device in enumerate(candidates):
        try:
            torch.ones(2, device=device).sum().item()
        except RuntimeError as error:
            notes.append(f"{device} does not work: {first_line(error)}")
        else:  # the others are not touched: that alone takes 0.6 GiB of a GPU
            kind = torch.device(device).type
            return [other for other in candidates[i:] if torch.device(other).type == kind], notes
    raise Failure(notes[-1])


def busy_note(when: str) -> list[str]:
    """A note if other programs use the processor: decode beside one was steadily a hundred times slower."""
    if psutil.cpu_percent(0.5) <= CPU_BUSY_PERCENT:  # this process sleeps meanwhile
        return []
    return [
        f"other programs used over {CPU_BUSY_PERCENT} % of the processor {when}: the speeds may be too low"
    ]


def nvml_handles(devices: list[str]) -> tuple[dict[str, Any], list[str]]:
    """NVML's handle of each GPU, and notes. By UUID: CUDA_VISIBLE_DEVICES renumbers, NVML does not."""
    handles = {}
    try:
        for device in devices:
            if device.startswith("cuda"):
                pynvml.nvmlInit()
                uuid = torch.cuda.get_device_properties(device).uuid
                handles[device] = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                device_memory_used(handles[device])  # not every driver and device can tell
    except pynvml.NVMLError as error:
        return {}, [f"no NVML: device memory in use and energy are unknown ({first_line(error)})"]
    return handles, []


def device_memory_used(handle: Any) -> int:
    """Bytes in use by all programs, as nvidia-smi has it: NVML's version 1 adds the driver's reserve."""
    return pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2).used


def energy_j(handles: dict[str, Any]) -> dict[str, float]:
    """Joules that each GPU has used since its driver was loaded (Volta and newer); empty without a count."""
    try:
        return {d: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 for d, handle in handles.items()}
    except pynvml.NVMLError:
        return {}


def synchronize(devices: list[str]) -> None:
    """Wait for all work on all devices."""
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        elif device == "mps":
            torch.mps.synchronize()


def describe_environment(devices: list[str], handles: dict[str, Any]) -> dict[str, str]:
    """Hardware and versions: a benchmark's are part of its result."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (named := re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)):
        cpu = named[1]
    info = {"cpu": f"{cpu}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    info["ram"] = f"{memory_of('cpu')[1] / 2**30:.1f} GiB"
    for device in devices:
        if device.startswith("cuda"):
            info[device] = f"{torch.cuda.get_device_name(device)}, {memory_of(device)[1] / 2**30:.1f} GiB"
    if handles:
        info["driver"] = pynvml.nvmlSystemGetDriverVersion()
    info |= {"os": f"{platform.system()} {platform.release()}", "python": platform.python_version()}
    info["torch"] = torch.__version__  # names the CUDA build, which the package's version need not
    return info | {package: version(package) for package in ("transformers", "optimum-quanto", "accelerate")}


def memory_bandwidth(device: str) -> float:
    """Bytes a second of a device's memory: the best of copies (read + written) and sums (read) of a GiB."""
    size = min(2**30, memory_of(device)[0] // 8)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for moved, job in ((2 * source.nbytes, lambda: target.copy_(source)), (source.nbytes, source.sum)):
        for _ in range(8):
            synchronize([device])
            begin = time.perf_counter()
            job()
            synchronize([device])
            best = max(best, moved / (time.perf_counter() - begin))
    return best


# ---------------------------------------------------------------------------------------------------- memory


def memory_of(device: str) -> tuple[int, int]:
    """Bytes that can still be taken on a device, and all it has: its own memory, or the computer's."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)
    return psutil.virtual_memory().available, psutil.virtual_memory().total


def snapshot(devices: list[str], handles: dict[str, Any], cuda: str = "current") -> dict[str, int]:
    """Bytes now: "rss" of this process, "cuda:0 used" (whole device), "… allocated" and "… reserved" (torch).

    torch keeps the last two on CUDA, `cuda` "current" or their "peak" since the reset; "" leaves them out.
    """
    seen = {}
    for device in devices:
        if device.startswith("cuda") and cuda:
            stats = torch.cuda.memory_stats(device)
            seen[f"{device} allocated"] = stats.get(f"allocated_bytes.all.{cuda}", 0)
            seen[f"{device} reserved"] = stats.get(f"reserved_bytes.all.{cuda}", 0)
        if device in handles:
            seen[f"{device} used"] = device_memory_used(handles[device])
        if device == "mps":
            seen["mps allocated"] = torch.mps.current_allocated_memory()
            seen["mps reserved"] = torch.mps.driver_allocated_memory()
    return seen | {"rss": psutil.Process().memory_info().rss}


@contextlib.contextmanager
def peak_memory(devices: list[str], handles: dict[str, Any]) -> Iterator[Callable[[], dict[str, int]]]:
    """Watches memory within the block; the function it yields gives the peaks so far, named as in `snapshot`.

    A thread polls, ten times a second, what keeps no peak itself; polling CUDA's allocator would slow runs.
    """
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
    seen = {}
    ended = threading.Event()

    def look() -> dict[str, int]:
        for name, value in snapshot(devices, handles, cuda="").items():
            seen[name] = max(value, seen.get(name, 0))
        return seen

    def watch() -> None:
        while not ended.wait(0.1):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: snapshot(devices, handles, cuda="peak") | look()
    finally:
        ended.set()
        watcher.join()


def plain_tensors(tensor: Any) -> list:
    """The tensors that hold a tensor's bytes, as `__tensor_flatten__` names them.

    A Quanto weight reports size and dtype of the unquantized one, so that `nbytes`, `element_size` and
    `get_memory_footprint` are all wrong for it.
    """
    tensor = getattr(tensor, "data", tensor)  # a Parameter hides the wrapper's methods
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [p for name in tensor.__tensor_flatten__()[0] for p in plain_tensors(getattr(tensor, name))]


def stored_bytes(tensors: Iterable) -> int:
    """Bytes stored for all of these tensors together, tied ones counted once."""
    plain = [p for tensor in tensors for p in plain_tensors(tensor) if p.numel()]
    return sum({(str(p.device), p.data_ptr()): p.nbytes for p in plain}.values())


# ------------------------------------------------------------------------------------------ getting the model

SMALL_FILES = r"[^/]+\.(json|txt|model|tiktoken|jinja|py|spm|vocab|bpe)"  # that from_pretrained reads


def progress_bars(title: str, total: int, plain_lines: bool) -> type[tqdm]:
    """Bars for huggingface_hub that draw nothing and tell the program how much of `total` bytes is here.

    It has one for bytes received, one for bytes written and one for files: the one ahead is told. They are
    called from threads, `display` under tqdm's lock. A total of 0 keeps them silent.
    """
    form = "{n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left"
    pause_s = 30 if plain_lines else 0.3
    begin = told_at = time.monotonic()
    told = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            every_update = {"mininterval": 0, "miniters": 1}
            super().__init__(*args, **options | every_update | {"file": io.StringIO(), "disable": False})

        def display(self, *_: Any, **__: Any) -> None:
            nonlocal told, told_at
            now = time.monotonic()
            here = min(total, self.n)
            if self.unit != "B" or here <= told or now - told_at < pause_s:
                return
            told, told_at = here, now
            meter = tqdm.format_meter(told, total, now - begin, unit="B", unit_scale=True, bar_format=form)
            log(f"{title}: {meter}") if plain_lines else status(f"{title}: {meter}", told / total)

    return Bar


def download_model(model_name: str, random_weights: bool, plain_lines: bool) -> str | None:
    """The local folder of the model's files, downloaded if need be; None for the built-in configuration.

    Where the Hub fails, a model with complete weights in the cache is taken as it is, though other files may
    be missing. Raises Failure.
    """
    if random_weights and model_name == "Qwen/Qwen2.5-3B":
        return None
    if Path(model_name).expanduser().is_dir():
        return str(Path(model_name).expanduser())
    try:
        return download_files(model_name, not random_weights, plain_lines)
    except Failure:
        raise
    except Exception as error:  # the Hub's client raises its own, the operating system's and httpx's
        config = huggingface_hub.try_to_load_from_cache(model_name, "config.json")
        why = first_line(error)
        folder = os.path.dirname(config) if isinstance(config, str) else None
        if folder and (random_weights or weight_names(folder, os.listdir(folder))):
            log(f"{model_name}: taken as it is cached here ({why})")
            return folder
        reason = (
            f"cannot get {model_name} from the Hub, and it is neither a folder nor complete in the cache "
            f"({why}). What to try: the same once more (complete files are kept), a mirror "
            "(set HF_ENDPOINT=https://…), "
            "a local folder (--model-name ./folder), or no download (--random-weights with Qwen/Qwen2.5-3B)"
        )
        if isinstance(error, huggingface_hub.errors.GatedRepoError):  # before the next, which it is too
            reason = f"{model_name} is gated: accept its terms on its page, then: hf auth login"
        elif isinstance(error, huggingface_hub.errors.RepositoryNotFoundError):
            reason = f"the Hub knows no model {model_name} (or it is private: hf auth login)"
        raise Failure(reason) from error


def download_files(model_name: str, with_weights: bool, plain_lines: bool) -> str:
    """The latest snapshot's folder; says how far it is. Raises Failure, or what huggingface_hub raises."""
    info = huggingface_hub.HfApi().model_info(model_name, timeout=10)
    title = f"getting {model_name}"
    files = [file.rfilename for file in info.siblings or ()]
    get = functools.partial(huggingface_hub.snapshot_download, model_name)
    silent = progress_bars(title, 0, plain_lines)
    small = [name for name in files if re.fullmatch(SMALL_FILES, name)]
    folder = get(allow_patterns=small, tqdm_class=silent)
    if not with_weights:
        return folder
    if not (names := weight_names(folder, files)):
        raise Failure(f"{model_name} holds no weights for transformers: of GGUF or PEFT, take the base model")
    # not all that this commit's folder lacks: files that did not change are cached with an earlier one
    planned = get(allow_patterns=names, tqdm_class=silent, dry_run=True)
    total = sum(file.file_size or 0 for file in planned if file.will_download)
    if total:
        log(f"{title}: {tqdm.format_sizeof(total)}B of weights")
    return get(allow_patterns=names, tqdm_class=progress_bars(title, total, plain_lines))


def weight_names(folder: str, files: Iterable[str]) -> list[str]:
    """The `files` that from_pretrained reads weights from, by `folder`'s index; none if one is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if name in files:
            return [name]
        if f"{name}.index.json" in files:
            index = json.loads(Path(folder, f"{name}.index.json").read_text(encoding="utf-8"))
            shards = set(index["weight_map"].values())
            return sorted(shards) if shards <= set(files) else []
    return []


def check_architecture(name: str, config: transformers.PreTrainedConfig) -> None:
    """Raises Failure for what AutoModelForCausalLM cannot load, or loads without what was trained."""
    kind = config.model_type
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return
    # a bare …Model may be fine, with its output tied to its input: loading tells
    headed = [a for a in config.architectures or () if not a.endswith("Model")]
    causal = any(a in classes.values() or "CausalLM" in a or "LMHead" in a for a in headed)
    if kind in classes and (causal or not headed):
        return
    seeing = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    what = "a vision-language model" if seeing else "no causal language model"
    named = ", ".join(config.architectures or ["its architecture is not named"])
    raise Failure(f"{name} is a {kind} model ({named}), {what}: take one for text, as Qwen2.5 and Llama are")


def check_quantization(s: Settings, folder: str, config: transformers.PreTrainedConfig, device: str) -> bool:
    """Whether a checkpoint is already quantized. Raises Failure if it cannot run as the settings want it."""
    stored = getattr(config, "quantization_config", None)
    stored = stored or getattr(config.get_text_config(), "quantization_config", None)
    method = stored.get("quant_method") if stored else None
    if method == "quanto" or Path(folder, "quanto_qmap.json").exists():
        saved = f"{s.model_name} was saved by Quanto"
        raise Failure(f"{saved}, which transformers cannot load: take the unquantized model")
    if not stored:
        return False
    reason = "Quanto cannot do it again; run it as stored with --weights none, or take the unquantized model"
    if not s.weights:
        try:
            quantizer = AutoHfQuantizer.from_config(dict(stored), pre_quantized=True)
            quantizer.validate_environment(device_map={"": device})
            return True
        except Exception as error:  # a package or a GPU that is missing, in transformers' own words
            reason = " ".join(str(error).split())
            if "optimum.gptq" in reason:  # where the words are Python's
                reason = "to run it, pip install gptqmodel optimum"
    raise Failure(f"{s.model_name} is already quantized ({method}): {reason}")


def check_checkpoint(s: Settings, folder: str, device: str) -> int | None:
    """Bytes of a checkpoint that is quantized, else None. Raises Failure for what cannot be measured."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=s.trust_remote_code)
    check_architecture(s.model_name, config)
    if s.random_weights:
        return None
    quantized = check_quantization(s, folder, config, device)
    files = [Path(folder, name) for name in weight_names(folder, os.listdir(folder))]
    if not files:
        raise Failure(f"{folder} lacks model.safetensors or a shard of it: download it again")
    for file in files:
        try:
            if file.suffix == ".safetensors":
                safetensors.safe_open(file, "pt")  # reads the header; the error does not name the file
        except safetensors.SafetensorError as error:
            raise Failure(f"{file} is damaged ({first_line(error)}): download it again") from error
    return sum(file.stat().st_size for file in files) if quantized else None


def load_tokenizer(name: str, folder: str, trust_remote_code: bool) -> Any:
    """Raises Failure, also without its files: of most models transformers 5 makes an empty one in silence."""
    files = r"tokenizer\.json|tekken\.json|vocab.*|tokenizer\.model.*|.*\.(model|tiktoken|spm|bpe)"
    if not any(re.fullmatch(files, path.name) for path in Path(folder).iterdir()):
        raise Failure(f"{name} has no tokenizer (tokenizer.json, tokenizer.model …): take a complete model")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise Failure(f"{name} has no usable tokenizer: {' '.join(str(error).split())}") from error


def load_peak_bytes(weight_bytes: int, largest_linear: int, weights: str | None) -> int:
    """Bytes of tensors that loading holds at most; what glibc keeps of freed ones comes on top on a CPU."""
    # while a layer is quantized, copies in bfloat16, float32 and int8: measured were 10.4 bytes for each of
    # its numbers (int8 and float8) and 8 (int4 and int2) on a CPU, 9.8 (int8) on CUDA
    return weight_bytes + (10 * largest_linear if weights else 0)


@dataclass
class RandomTensor:
    """A checkpoint's tensor that is made when transformers reads it, `tensor[...]`, of one block repeated.

    It reads one, quantizes it and only then reads the next (core_model_loading.py,
    has_on_the_fly_quantization): the unquantized model is never in memory.
    """

    shape: torch.Size
    dtype: torch.dtype
    block: torch.Tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        flat = torch.empty(self.shape.numel(), dtype=self.dtype)
        for part in flat.split(self.block.numel()):
            part.copy_(self.block[: part.numel()])
        return flat.view(self.shape)


def random_state(model: Any) -> dict[str, Any]:
    """Random weights for a meta model; not for a tied output embedding: from_pretrained would untie it."""
    torch.manual_seed(0)
    block = torch.randn(2**22).mul_(0.02).to(model.dtype)
    state = {}
    tied = model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        if name in tied or not tensor.is_floating_point():
            continue
        if tensor.ndim < 2:
            state[name] = torch.full(tensor.shape, float("norm" in name), dtype=tensor.dtype)
        else:
            state[name] = RandomTensor(tensor.shape, tensor.dtype, block)
    return state


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


# ----------------------------------------------------------------------------------------------------- model

INT4_ROWS = {"cpu": 16, "cuda": 8}  # TinyGemm, the 4-bit kernel, wants a number of rows divisible by this
DEFECTS = {  # what was mended -> what Quanto as shipped does; "{}" layers
    "int8 shape": "'s int8 can crash or answer wrongly on a CPU: some layers have no multiple of 16 inputs",
    "strides": "'s kernel stops or crashes: it does not take activations as they lie in this model",
    "int4 shape": "'s int4 cannot be loaded here: its kernel does not take the output size of {} layers",
    "zeros": "'s float8 answers NaN: some layers have a row of zeros",
    "extension": " compiles a C++ extension before the first answer",
    "bias": "'s float8 compiles a CUDA extension, which then leaves out the bias of up to {} layers",
    "routers": " makes plain linear layers of {} layers that do more",
}
MENDED: set[str] = set()  # those of DEFECTS that were met so far


def mend_quanto(leave_kernels: bool = False) -> None:
    """Keep Quanto from building extensions, losing biases and crashing: optimum-quanto 0.2.7, torch 2.13.0.

    - tensor/weights/marlin/fp8/qbits.py:30: the float8 Marlin kernel never adds its bias; without
      "quanto_cuda" float8 takes quanto::qbytes_mm.
    - library/extensions/extension.py:47: `unpack` (int2; int4 without TinyGemm) compiles for minutes, and a
      stale lock file makes it hang.
    - library/qbytes_mm.py:101 calls torch._weight_int8pack_mm for any in_features % 4 == 0, see int8_product.
    - tensor/weights/qbits.py:119 takes TinyGemm whatever the shape, tensor/weights/tinygemm/qbits.py:53
      whatever the strides; the kernels refuse (aten/src/ATen/native/cuda/int4mm.cu).
    - tensor/optimizers/absmax_optimizer.py:35: a row of zeros gets the scale 0, and float8 then holds 0 / 0.

    A second call changes nothing.
    """
    if leave_kernels or hasattr(qbytes_mm, "shipped"):
        return
    for registered in extension._extensions.values():
        registered._lib = types.SimpleNamespace(unpack=unpack)
    extension._extensions.pop("quanto_cuda", None)
    qbytes_mm.shipped = qbytes_mm.qbytes_int8pack_mm
    qbytes_mm.qbytes_int8pack_mm = int8_product  # qbytes_mm_impl_cpu looks the name up when it is called
    create, multiply = WeightQBitsTensor.create, TinyGemmQBitsLinearFunction.forward
    find_scale = AbsmaxOptimizer.optimize

    def create_if_it_fits(qtype, axis, group_size, size, stride, data, scale, shift, requires_grad=False):
        fits = size[0] % INT4_ROWS.get(data.device.type, 1) == 0
        make = create if fits else WeightQBitsTensor
        return make(qtype, axis, group_size, size, stride, data, scale, shift, requires_grad)

    def multiply_contiguous(ctx, x, weight, bias):
        if not x.is_contiguous():
            MENDED.add("strides")
        return multiply(ctx, x.contiguous(), weight, bias)

    def scale_above_zero(self, base, qtype, axis=None):
        scale = find_scale(self, base, qtype, axis)
        if qtype.is_floating_point and (scale == 0).any():
            MENDED.add("zeros")
        return scale.masked_fill_(scale == 0, 1)

    WeightQBitsTensor.create = staticmethod(create_if_it_fits)
    TinyGemmQBitsLinearFunction.forward = staticmethod(multiply_contiguous)
    AbsmaxOptimizer.optimize = scale_above_zero


def leave_out_cudnn_attention(leave_kernels: bool) -> bool:
    """Keep torch from cuDNN's attention; whether that changed anything.

    On Hopper torch prefers it (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, priority_order), and it
    plans its kernels anew for each shape (cudnn/MHA.cpp, a cache by shape): at each new context length a
    token takes 30 ms more, so that short runs time cuDNN's planning (torch 2.11, H100).
    """
    if leave_kernels or not torch.cuda.is_available():
        return False
    shipped = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    return shipped


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers [rows * 8 / bits, columns] of `bits` bits from bytes [rows, columns], as Quanto has them."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def int8_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x @ (weight * scale).T on a CPU: x [rows, in] in bfloat16, weight [out, in] in int8, scale [out, 1].

    torch._weight_int8pack_mm (aten/src/ATen/native/cpu/int8mm_kernel.cpp) reads 16 columns at a time with no
    remainder, by loads that want multiples of 32 bytes as addresses: elsewhere it crashes or answers garbage.
    """
    if x.shape[-1] % 16:
        MENDED.add("int8 shape")
        return qbytes_mm.qbytes_mm(x, weight, scale)
    if not x.is_contiguous() or x.data_ptr() % 32:
        MENDED.add("strides")
        x = x.clone(memory_format=torch.contiguous_format)
    return qbytes_mm.shipped(x, weight, scale)


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer and no more; Llama 4's and PhiMoE's routers inherit from one."""
    if not isinstance(module, torch.nn.Linear):
        return False
    plain = type(module).forward in (torch.nn.Linear.forward, optimum.quanto.QLinear.forward)
    return plain or type(module).__name__ == "FalconLinear"  # x @ weight.T + bias, written out


def routers(model: Any) -> list[str]:
    """Names of the layers that inherit from nn.Linear and do more."""
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not is_linear(m)]


def modules_to_skip(model: Any) -> list[str]:
    """What QuantoConfig(modules_to_not_convert=…) must name for right answers; a meta model will do.

    transformers' integrations/quanto.py:91 replaces every subclass of nn.Linear, and what its forward does is
    lost. The list replaces the default one (quantizers/base.py:268), hence its names come first. Names are
    regular expressions, up to 5.17 of any prefix (quantizers/quantizers_utils.py, should_convert_module):
    hence the mark of the end.
    """
    return sorted(get_keys_to_not_convert(model)) + [f"{re.escape(name)}$" for name in routers(model)]


def quanto_defects(model: Any) -> dict[str, str]:
    """Those of DEFECTS that a quantized model met when it ran -> their sentences: "as shipped, Quanto …".

    The number of layers stands where the model tells it.
    """
    layers = Counter(sorted(MENDED))  # that these were met, not how often
    layers["routers"] = len(routers(model))
    for module in linear_layers(model):
        weight = module.weight.data
        rows, columns = module.weight.shape
        if type(weight) is WeightQBitsTensor:
            if (weight._qtype.bits, weight._group_size, weight.dtype) != (4, 128, torch.bfloat16):
                layers["extension"] += 1
            elif rows % INT4_ROWS.get(weight.device.type, 1):
                layers["int4 shape"] += 1
        elif hasattr(weight, "_qtype") and weight._qtype.is_floating_point and weight.is_cuda:
            layers["bias"] += module.bias is not None and rows % 64 == columns % 64 == 0
    return {n: f"as shipped, Quanto{DEFECTS[n].format(count)}" for n, count in layers.items() if count}


def max_positions(config: transformers.PreTrainedConfig) -> float:
    """The longest sequence that a model takes, whatever its configuration calls it; infinite if unnamed."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "model_max_length")
    return next((getattr(text, name) for name in names if getattr(text, name, None)), math.inf)


def make_meta_model(s: Settings, folder: str | None) -> Any:
    """The model without memory (on torch's meta device), in the dtype it will be loaded in."""
    if folder is None:
        config = AutoConfig.for_model(**QWEN2_5_3B)
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=s.trust_remote_code)
    if s.random_weights:
        vars(config).pop("quantization_config", None)  # there are no such weights
    elif config.dtype is None:  # the checkpoint's own
        file = Path(folder, weight_names(folder, os.listdir(folder))[0])
        config.dtype = get_state_dict_dtype(load_state_dict(file, map_location="meta"))
    if s.dtype != "auto":
        config.dtype = getattr(torch, s.dtype)
    config.dtype = config.dtype or torch.float32
    options = {"dtype": config.dtype, "trust_remote_code": s.trust_remote_code}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def linear_layers(model: Any) -> list[torch.nn.Module]:
    """The linear layers, as Quanto's transformers integration sees them: all but the output embedding."""
    return [m for m in model.modules() if is_linear(m) and m is not model.get_output_embeddings()]


def expected_bytes(model: Any, precision: str) -> int:
    """Bytes that a meta model's weights will take: 8 bits with a scale a row, else two a group of 128."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    total = sum(t.nbytes for t in tensors.values())
    if precision == "none":
        return total
    for weight in (layer.weight for layer in linear_layers(model)):
        scales = weight.shape[0] if BITS[precision] == 8 else 2 * weight.numel() / 128
        total += weight.numel() * BITS[precision] / 8 + scales * model.dtype.itemsize - weight.nbytes
    return int(total)


def place_model(bench: Bench, meta_model: Any, stored: int | None) -> None:
    """Keep of the devices the first GPU that the model fits, else all; say what is coming.

    `stored` bytes has a checkpoint that is quantized already, which no other precision can make smaller.
    Raises Failure for a model beyond the devices' total memory; one beyond their free memory is tried.
    """
    s = bench.settings
    largest = max((m.weight.numel() for m in linear_layers(meta_model)), default=0)
    needed = stored or expected_bytes(meta_model, s.weights or "none")
    peak = load_peak_bytes(needed, largest, s.weights)
    roomy = next((d for d in bench.devices if max(needed * 1.1, peak) < memory_of(d)[0]), None)
    bench.devices = [roomy] if roomy else bench.devices
    free, total = map(sum, zip(*map(memory_of, bench.devices), strict=True))
    sizes = {} if stored else {p: expected_bytes(meta_model, p) for p in PRECISIONS}
    fits = [f"{p} ({gib(size)} GiB)" for p, size in sizes.items() if size * 1.1 < free and size < needed]
    free_here = f"{gib(free)} GiB free on {', '.join(bench.devices)}"
    bench.advice = f"{free_here}; " + (f"would fit: {', '.join(fits)}" if fits else SMALLER)
    size = format_3g(sum(p.numel() for p in meta_model.parameters()), 1e9)
    expected = f"{gib(needed)} GiB of weights expected (up to {gib(peak)} while loading)"
    tried = ": tried all the same" if peak > free else ""
    log(f"{s.model_name}, {s.weights or 'as stored'}: {size} B parameters, {expected}, {free_here}{tried}")
    if needed > total:
        raise Failure(f"the weights need {gib(needed)} of {gib(total)} GiB in all; {bench.advice}")


def load_model(s: Settings, folder: str | None, meta_model: Any, devices: list[str]) -> Any:
    """The model of `meta_model`, quantized while it loads; spread over all `devices` if there are several.

    Raises Failure for a checkpoint that lacks weights.
    """
    transformers.logging.disable_progress_bar()
    options = {"dtype": meta_model.dtype, "device_map": {"": devices[0]} if len(devices) == 1 else "auto"}
    if s.weights:
        mend_quanto(s.quanto_kernels)
        skipped = modules_to_skip(meta_model)
        options["quantization_config"] = QuantoConfig(weights=s.weights, modules_to_not_convert=skipped)
    if s.random_weights:
        state = random_state(meta_model)
        model = type(meta_model).from_pretrained(None, config=meta_model.config, state_dict=state, **options)
    else:
        options |= {"trust_remote_code": s.trust_remote_code, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
        missing = [key for key in info["missing_keys"] if not key.endswith(ACTIVATION_SCALES)]
        if missing:
            what = f"{len(missing)} weights ({missing[0]}) of a {type(model).__name__}"
            raise Failure(f"the checkpoint lacks {what}: download it again, or take another model")
    if {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())) - {*devices}:
        raise Failure(f"the model does not fit {', '.join(devices)}: parts were left to the CPU or the disk")
    return model.eval()


def weight_stats(model: Any, devices: list[str]) -> dict[str, Any]:
    """The fields of a Result about the weights: bytes, and how many layers Quanto really holds."""
    linear = [layer.weight.data for layer in linear_layers(model)]
    quantized = [weight for weight in linear if hasattr(weight, "_qtype")]
    parameters = list(model.parameters())
    # not Quanto's scales of activations: scalars that no quantized weight uses
    buffers = [b for name, b in model.named_buffers() if not name.endswith(ACTIVATION_SCALES)]
    # a wrapper reports numel and dtype of the unquantized weight: here that is what is wanted
    unquantized = lambda tensors: sum(t.numel() * t.dtype.itemsize for t in tensors)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in parameters),
        "weight_bytes": stored_bytes([*parameters, *buffers]),
        "device_weight_bytes": {
            d: stored_bytes(p for p in parameters if str(p.device) in (d, f"{d}:0")) for d in devices
        },
        "unquantized_bytes": unquantized({id(t): t for t in [*parameters, *buffers]}.values()),
        "quantizable_bytes": unquantized(linear),
        "quantized_layers": len(quantized),
        "linear_layers": len(linear) + hasattr(model.get_output_embeddings(), "weight"),
        "skipped_layers": len(routers(model)) if quantized else 0,
        "weight_types": dict(Counter(type(weight).__name__ for weight in quantized)),
    }


def has_experts(model: Any) -> bool:
    """Whether this is a mixture of experts, of which a decode step reads some: by its modules' names, or by a
    weight (a router's, or all experts' in one) with as many rows as the configuration has experts.

    A configuration alone tells nothing: those of dense Doge and Nemotron-H models count experts too.
    """
    if any(re.search("expert|moe", name) for name, _ in model.named_modules()):
        return True
    config = model.config.get_text_config().to_dict()
    inner = [value for value in config.values() if isinstance(value, dict)]  # as DBRX's ffn_config
    counted = r"(num|n)_(local_|routed_)?experts$"
    counts = {v for d in (config, *inner) for k, v in d.items() if re.search(counted, str(k))} - {None, 0, 1}
    return any(p.ndim > 1 and len(p) in counts for p in model.parameters())


def decode_weight_bytes(model: Any) -> int | None:
    """Bytes of weights that one decode step must read: all but an untied input embedding.

    None for a mixture of experts, of which a step reads some.
    """
    if has_experts(model):
        return None
    given, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is None or given.weight.data_ptr() == output.weight.data_ptr()
    return stored_bytes(model.parameters()) - (0 if tied else stored_bytes([given.weight]))


# of CUDA and MPS, of the CPU on Linux and on Windows, of cuBLAS
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
MACHINE_LACKS = {  # what an error's text says -> what the user is told: not a failure of the model
    "No working C++ compiler": "needs a C++ compiler (apt install g++; Windows: Visual Studio Build Tools)",
    "Failed to find C compiler": "needs a C compiler (Linux: apt install gcc)",
    "Python.h": "needs Python's headers (apt install python3-dev)",
    "working triton": "needs a working Triton (pip install triton; on Windows triton-windows)",
    "No module named 'triton'": "needs Triton (pip install triton; on Windows triton-windows)",
}
KNOWN_ERRORS = {  # the same for failures
    "recognize this architecture": "this transformers does not know the model's architecture: upgrade it",
    "trust_remote_code": "the model runs code of its repository: read it, then add --trust-remote-code",
    # transformers integrations/quanto.py:42 takes one tensor a layer
    "automatic conversion": "transformers cannot quantize this checkpoint by Quanto: --weights none runs it",
    # Quanto tensor/weights/qbytes.py:294
    "Tensor cannot be changed": "Quanto cannot run this model: a layer reads weights in another dtype",
}


def describe_error(error: Exception, advice: str) -> tuple[str, bool]:
    """An exception in the user's words, and whether this machine lacks something (else it is a failure)."""
    text = str(error)
    doing = getattr(error, "step", "starting")
    if isinstance(error, Failure):
        return text, False
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in OUT_OF_MEMORY):
        return f"out of memory while {doing}: {advice}", False
    for sign, told in (MACHINE_LACKS | KNOWN_ERRORS).items():
        if sign.lower() in text.lower():
            return told, sign in MACHINE_LACKS
    told = f"{type(error).__name__} while {doing}: {first_line(error)} (--debug shows more)"
    return told, isinstance(error, NotImplementedError)  # no such operation on MPS


# ------------------------------------------------------------------------------------------- compiled decode
# Quanto under torch.compile. The documented `model = torch.compile(model)` compiles nothing, since generate()
# is bound to the model inside (pytorch #161743), and generate()'s own compiling refuses Quanto
# (is_compileable in transformers' quantizers/base.py). Here linear layers hold Quanto's numbers as plain
# tensors: a wrapped weight costs Python on every call, and quanto::qbytes_mm (library/qbytes_mm.py:24) is
# opaque: 5 bytes are moved for each weight of one. Then either
# - "this script's step", for ordinary attention: generate() gets a decode step whose attention reads the
#   static cache in windows (all of a long cache costs half the rate on a CPU), whose layers are compiled one
#   by one, those that are alike once, and a loop to call it; on CUDA one graph a window is captured and
#   replayed, or
# - "transformers' static cache", for all others: generate() as transformers compiles it.

WINDOW = 256  # tokens
GEMV_EARLY_BYTES = 12e6  # of a matrix that fits the registers of an H100: it is loaded while the kernel waits
NOT_COMPILED, LEAVE_OUT = "transformers does not compile this model", "leave --compile out"
OWN_STEP = "this script's compiled decode step"
STATIC_CACHE = "compiled with transformers' static cache"


@dataclass
class CompiledDecode:
    """A model whose decode step is compiled: `way` is OWN_STEP or STATIC_CACHE, `graphs` counts Dynamo's."""

    way: str
    graphs: int
    options: dict[str, Any]  # what generate() needs besides its own


def supports_pdl() -> bool:
    """Whether a kernel can start while the one before it ends: programmatic dependent launch (Hopper on)."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability() >= (9, 0)


def pdl_options() -> dict[str, Any]:
    """For a kernel that calls gdc_wait and gdc_launch_dependents where PDL is set."""
    return {"PDL": True, "launch_pdl": True} if supports_pdl() else {"PDL": False}


if triton:

    @triton.jit
    def gemv_kernel(
        x, weight, scale, y, rows, cols,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        cell = weight + row.to(tl.int64)[:, None] * cols + col[None, :]
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        if EARLY:  # weights are constant: they may be read before the kernel that writes x has ended
            loaded = tl.load(cell, (row < rows)[:, None] & (col < cols)[None, :], 0.0)
        if PDL:
            # in this order: the kernel after this one takes for granted that the one before it has ended
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if EARLY:
            total += loaded.to(tl.float32) * tl.load(x + col, col < cols, 0.0).to(tl.float32)[None, :]
        for first in tl.range(BLOCK if EARLY else 0, cols, BLOCK, num_stages=3):
            inside = (row < rows)[:, None] & (first + col < cols)[None, :]
            values = tl.load(cell + first, inside, 0.0).to(tl.float32)
            total += values * tl.load(x + first + col, first + col < cols, 0.0).to(tl.float32)[None, :]
        factor = tl.load(scale + row, row < rows).to(tl.float32)
        tl.store(y + row, tl.sum(total, 1) * factor, row < rows)

    @triton.jit
    def split_kv(
        query, key, value, mask, out, top, total, group, size, scaling, stride,
        GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        head, block, count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        g, i, place = tl.arange(0, GROUP), tl.arange(0, SIZE), block * BLOCK + tl.arange(0, BLOCK)
        seen = tl.load(mask + place)
        cell = head.to(tl.int64) * stride + place[:, None] * size + i[None, :]
        filled, inside = seen[:, None] & (i < size)[None, :], (g < group)[:, None] & (i < size)[None, :]
        q = tl.load(query + (head * group + g)[:, None] * size + i[None, :], inside, 0.0)
        k, v = tl.load(key + cell, filled, 0.0), tl.load(value + cell, filled, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where(seen[None, :], scores, -1e30)
        highest = tl.max(scores, 1)
        weights = tl.exp(scores - highest[:, None])  # 0 if unseen; `combine` drops all-unseen blocks
        row = (head * count + block) * group + g
        tl.store(top + row, highest, g < group)
        tl.store(total + row, tl.sum(weights, 1), g < group)
        part = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        tl.store(out + row[:, None] * size + i[None, :], part, inside)

    @triton.jit
    def combine(
        part, top, total, out, count, group, size,
        SIZE: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        head, i = tl.program_id(0), tl.arange(0, SIZE)
        highest, weight, y = -1e30, 0.0, tl.zeros((SIZE,), tl.float32)
        for first in tl.range(0, count, BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            row = ((head // group) * count + block) * group + head % group
            tops = tl.load(top + row, block < count, -1e30)
            new = tl.maximum(highest, tl.max(tops, 0))
            old, factor = tl.exp(highest - new), tl.exp(tops - new)
            weight = weight * old + tl.sum(factor * tl.load(total + row, block < count, 0.0), 0)
            inside = (block < count)[:, None] & (i < size)[None, :]
            rows = tl.load(part + row[:, None] * size + i[None, :], inside, 0.0)
            y, highest = y * old + tl.sum(factor[:, None] * rows, 0), new
        tl.store(out + head * size + i, y / weight, i < size)


@torch.library.custom_op("qwquanto::gemv", mutates_args=())
def gemv(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """y [..., rows] = (weight [rows, columns] x [..., columns]) * scale [rows, 1] for one token on CUDA.

    A decode step's matrix product, which reads each stored byte once and sums in float32. In Triton, since
    Inductor's own reductions come out right only by minutes of tuning, and not every time. Also for
    unquantized weights.
    """
    rows, cols = weight.shape
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    # of 40 forms the fastest on an H100, for matrices of its size
    form = {"ROWS": 2, "BLOCK": 1024, "EARLY": False, "num_warps": 2}
    if weight.nbytes < GEMV_EARLY_BYTES:
        form = {"ROWS": 4, "BLOCK": 2048 if cols > 1024 else 1024, "EARLY": True, "num_warps": 4}
    gemv_kernel[(triton.cdiv(rows, form["ROWS"]),)](x, weight, scale, y, rows, cols, **form, **pdl_options())
    return y


gemv.register_fake(lambda x, weight, *_: x.new_empty(*x.shape[:-1], len(weight)))


@torch.library.custom_op("qwquanto::flash_decode", mutates_args=())
def flash_decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of one token on CUDA.

    query [1, heads, 1, size], key and value [1, kv heads, length, size], mask [1, 1, 1, window].
    Flash decoding (Dao and others 2023): each block of 64 places by itself, then all blocks together.
    Inductor's sums read the keys for every head anew and run along the window on few processors: 2 and 15 us
    slower a layer at 256 and 2048 places on an H100.
    """
    _, heads, _, size = query.shape
    kv = key.shape[1]
    count, group, wide = mask.shape[-1] // 64, heads // kv, triton.next_power_of_2(size)
    part = query.new_empty(kv, count, group, size, dtype=torch.float32)
    top, total = part.new_empty(kv, count, group), part.new_empty(kv, count, group)
    form = {"GROUP": max(16, triton.next_power_of_2(group)), "SIZE": wide, "BLOCK": 64}
    tensors = (query, key, value, mask, part, top, total)
    split_kv[(kv, count)](*tensors, group, size, scaling, key.stride(1), **form, **pdl_options())
    out = torch.empty_like(query)
    combine[(heads,)](part, top, total, out, count, group, size, wide, 16, **pdl_options())
    return out


flash_decode.register_fake(lambda query, *_: torch.empty_like(query))


class DequantLinear(torch.nn.Module):
    """A linear layer whose weight lies in plain tensors; a subclass's product() takes x [tokens, in].

    Layers that are given the same input (q, k and v; gate and up) share one `merged` layer: their tensors,
    which serve the prompt, are then views of its tensors, and its product of one token, of which each takes
    its `part`, is computed once (SharedProducts).
    """

    # the tensors to merge -> their dimension of the outputs, and how many outputs make one index of it
    rows: dict[str, tuple[int, int]]
    merge_key: Any = None  # what layers must have in common to be merged; None: nothing to gain

    def __init__(self, bias: torch.Tensor | None, **tensors: torch.Tensor) -> None:
        super().__init__()
        self.bias = bias
        self.merged = ()  # in a tuple, it is no submodule
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        if self.merged and len(tokens) == 1:
            y = self.merged[0].product(tokens)[:, self.part]
        else:
            y = self.product(tokens)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class PerChannelLinear(DequantLinear):
    """8 bits, or as stored with a scale of one: data [out, in], scale [out, 1]."""

    rows: ClassVar = {"data": (0, 1), "scale": (0, 1)}

    def __init__(self, bias: torch.Tensor | None, data: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(bias, data=data, scale=scale)
        if data.is_cuda:
            native = torch.cuda.get_device_capability(data.device) >= (8, 9)
        else:
            native = torch.backends.cpu.get_cpu_capability() == "AVX512"
        self.emulated = data.dtype == torch.float8_e4m3fn and not native
        self.gemv = data.is_cuda and not self.emulated and triton is not None
        # As Quanto does on a CPU (library/qbytes_mm.py asks for 4), but torch 2.13's kernel crashes or is
        # wrong unless in_features is a multiple of 16: aten/src/ATen/native/cpu/int8mm_kernel.cpp
        self.int8pack = data.is_cpu and data.dtype == torch.int8 and data.shape[1] % 16 == 0
        # for one token, Inductor's sums are a third faster with AVX512, with AVX2 up to seven times slower
        self.sums = native
        if self.gemv or data.is_cpu:
            self.merge_key = data.dtype, scale.dtype, data.shape[1]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        data, scale = self.data, self.scale
        if self.gemv and len(x) == 1:
            return gemv(x.contiguous(), data, scale)
        several = len(x) > 1 or not torch.compiler.is_compiling()
        if self.int8pack and x.dtype == scale.dtype == torch.bfloat16 and (several or not self.sums):
            # a copy: a part of a row may lie at an address that is no multiple of 32: the kernel crashes
            x = x.clone(memory_format=torch.contiguous_format)
            return torch._weight_int8pack_mm(x, data, scale.flatten())
        if several:
            return x @ (data if data.dtype == x.dtype else data.to(x.dtype) * scale).t()
        # Sums, not a matmul: Inductor fuses them with the reading of the bytes. On a CPU one loop reads a row
        # of each quarter of the matrix, so x is converted once for four; sums of over 4096 numbers are slower
        quarters, chunks, cols = 1, 1, data.shape[1]
        if data.is_cpu:
            quarters = math.gcd(len(data), 4)
            chunks = next((n for n in range(1, 9) if cols % n == 0 and cols // n <= 4096), 1)
        floats = x.float().view(chunks, -1)
        rows = data.view(quarters, -1, chunks, cols // chunks)
        y = torch.stack([(floats * self.to_float(part)).sum(-1) for part in rows]).sum(-1).flatten()
        return (y * scale.float().flatten()).to(x.dtype)[None]

    def to_float(self, data: torch.Tensor) -> torch.Tensor:
        if not self.emulated:
            return data.float()
        # the bits of a float16 of 1/256 of the value, in operations that every machine vectorizes
        half = data.view(torch.int8).to(torch.int16) * 128 & -16512
        return half.view(torch.float16).float() * 256


class GroupwiseLinear(DequantLinear):
    """4 or 2 bits, weight = q * scale + zero a group; data[row, group, i] packs elements i, i + chunk, …"""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        groups, chunk = self.data.shape[1:]
        parts = x.shape[1] // groups // chunk
        bits = 8 // parts
        q = [self.data >> (bits * i) & (2**bits - 1) for i in range(parts)]
        if len(x) > 1 or not torch.compiler.is_compiling():
            weight = torch.stack(q, 2).flatten(2) * self.scale[:, :, None] + self.zero[:, :, None]
            return x @ weight.flatten(1).to(x.dtype).t()
        # The zero is taken out of the sum over a group. The bits stay where they lie in the byte: dividing x
        # by their power of two (exact) takes less than shifting each weight. Four rows a loop, as above
        x = x.reshape(groups, parts, chunk).float()
        shifted = [(x[:, i] * 2.0 ** (-bits * i), (2**bits - 1) << (bits * i)) for i in range(parts)]
        quarters = math.gcd(len(self.data), 4) if self.data.is_cpu else 1
        dots = []
        for data, scale in zip(self.data.chunk(quarters), self.scale.float().chunk(quarters), strict=True):
            dots.append((sum(x * (data & mask) for x, mask in shifted) * scale[:, :, None]).sum((1, 2)))
        y = torch.cat(dots) + (x.sum((1, 2)) * self.zero.float()).sum(-1)
        return y.to(self.scale.dtype)[None]


class TinyGemmLinear(DequantLinear):
    """4 bits in bfloat16, by the kernel that Quanto uses too; its scale is [groups, out, scale and zero]."""

    rows: ClassVar = {"data": (0, 8), "scale": (1, 1)}

    def __init__(self, bias: torch.Tensor | None, data: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(bias, data=data, scale=scale)
        self.merge_key = (data.shape[1:], len(scale)) if data.is_cuda else None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        mm = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
        return mm(x.contiguous(), self.data, x.shape[1] // len(self.scale), self.scale.contiguous())


def dequant_linear(linear: torch.nn.Linear) -> DequantLinear:
    """A layer that computes the same with plain tensors, for an unquantized layer or one of Quanto's."""
    weight, bias = getattr(linear.weight, "data", linear.weight), linear.bias
    if not hasattr(weight, "_qtype"):
        return PerChannelLinear(bias, weight, weight.new_ones(len(weight), 1))
    if weight._qtype.bits == 8:
        if type(weight) is not WeightQBytesTensor:  # Marlin's
            weight = weight.weight_qbytes_tensor()
        # a layer of one output has one scale without a dimension
        return PerChannelLinear(bias, weight._data, weight._scale.reshape(-1, 1).expand(len(weight), 1))
    if isinstance(weight, TinyGemmWeightQBitsTensor):
        data = weight._data._data
        if weight.is_cuda:  # packed anew for fewer, larger reads
            q = weight._data.unpack()
            data = torch._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).contiguous(), 8)
        return TinyGemmLinear(bias, data, weight._scale_shift)
    if type(weight) is not WeightQBitsTensor:  # AWQ's
        weight = weight.weight_qbits_tensor()
    bits, rows, packed = weight._qtype.bits, weight.shape[0], weight._data._data
    q = unpack(packed, bits)[: len(weight._data)]  # not PackedTensor's, which compiles a C++ extension
    scale, shift = weight._scale.view(rows, -1), weight._shift.view(rows, -1)
    parts = math.gcd(8 // bits, weight.shape[1] // scale.shape[1])  # as many in a byte as divide a group
    q = q.view(rows, scale.shape[1], parts, -1)
    data = sum(q[:, :, i] << 8 // parts * i for i in range(parts))
    zero = -shift if shift.is_floating_point() else -shift * scale
    return GroupwiseLinear(bias, data=data, scale=scale, zero=zero)


def swap_layers(model: Any) -> None:
    """Give a model the linear layers above. Subclasses of nn.Linear with a forward of their own stay."""
    # names, not modules: a layer that is replaced must not stay in memory
    for name in [name for name, module in model.named_modules() if is_linear(module)]:
        model.set_submodule(name, dequant_linear(model.get_submodule(name)))


def merge_layers(model: Any) -> None:
    """Merge the layers of one parent that are given the very same tensor, as a run of one token shows."""
    given: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
        for name, module in model.named_modules()
        if isinstance(module, DequantLinear) and module.merge_key
    ]
    model(input_ids=torch.ones(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    groups: dict[tuple, list[DequantLinear]] = {}
    for name, tensor in given.items():
        layer = model.get_submodule(name)
        key = name.rpartition(".")[0], id(tensor), type(layer), layer.merge_key
        groups.setdefault(key, []).append(layer)
    for (_, _, kind, _), layers in groups.items():
        if len(layers) == 1:
            continue
        whole = {n: torch.cat([getattr(s, n) for s in layers], dim) for n, (dim, _) in kind.rows.items()}
        merged = kind(None, **whole)
        first = 0
        for layer in layers:
            last = first + layer.scale.shape[kind.rows["scale"][0]]
            for n, (dim, unit) in kind.rows.items():
                setattr(layer, n, whole[n].narrow(dim, first // unit, (last - first) // unit))
            layer.merged = (merged,)
            layer.part = slice(first, last)
            first = last


class SharedProducts(CustomGraphPass):
    """Inductor pass: a product that several layers ask for (their `merged` one) is computed once."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        aten, ours = torch.ops.aten, torch.ops.qwquanto
        seen = {}
        products = ours.gemv, aten._weight_int4pack_mm, aten._weight_int8pack_mm
        pure = {op.default for op in (*products, aten.view, aten.reshape)}
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in pure:
                first = seen.setdefault((node.target, str(node.args)), node)
                if first is not node:
                    node.replace_all_uses_with(first)
                    graph.erase_node(node)

    def uuid(self) -> str:
        return "qwquanto.SharedProducts 5"  # Inductor's cache on disk goes by it


INDUCTOR_OPTIONS = {
    "combo_kernels": True,
    "post_grad_custom_pre_pass": SharedProducts(),
    "size_asserts": False,  # checks of each call's tensors: on a CPU 20 us a layer
    "alignment_asserts": False,
}


def window_attention(module, query, key, value, mask, scaling=None, **more):
    """Attention over the first mask.shape[-1] places of the cache; heads of a group share keys uncopied.

    transformers' own sdpa copies keys and values for every head, and reads all of a static cache. Refuses the
    variants that it would get wrong.
    """
    unknown = {name for name, value in more.items() if value is not None}
    unknown &= {"softcap", "s_aux", "sliding_window", "position_bias"}
    if unknown or mask is None:
        raise Failure(f"this script's step does not know this attention ({', '.join(unknown) or 'no mask'})")
    batch, heads, length, size = query.shape
    # value.shape: DeepSeek's values are narrower
    if length == 1 and query.is_cuda and triton and value.shape == key.shape:
        out = flash_decode(query.contiguous(), key, value, mask, scaling)
        return out.view(batch, 1, heads, size), None
    key, value = key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]
    if length == 1:
        query = query.view(batch, key.shape[1], -1, size)
        # sums, not matmuls: Inductor fuses and vectorizes them; in float32 Qwen2's large scores stay exact
        scores = (query[..., None, :].float() * key[:, :, None]).sum(-1) * scaling
        weights = torch.softmax(scores.masked_fill(~mask, -math.inf), -1)
        out = (weights[..., None] * value[:, :, None]).sum(-2).to(value.dtype)
    else:
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


class StepLayer(StaticLayer):
    """A layer of the step's cache: all share one tensor with the token's position, and none counts itself."""

    def __init__(self, max_cache_len: int, position: torch.Tensor) -> None:
        super().__init__(max_cache_len)
        self.position = position  # [1]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple:
        """Write a prompt from the first place on, one token at the position; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[-2]
        places = self.position if length == 1 else torch.arange(length, device=self.device)
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0  # generate() always begins anew

    def reset(self) -> None:
        self.position.zero_()


def draw_token(scores: torch.Tensor, do_sample: bool, top_k: int | None) -> torch.Tensor:
    """A token [1, 1] by its scores [1, vocabulary]: the best, or one of all, or one of the `top_k` best."""
    if not do_sample:
        return scores.argmax(-1, keepdim=True)
    if not top_k:
        return torch.multinomial(scores.softmax(-1), 1)
    best, tokens = scores.topk(min(top_k, scores.shape[-1]))
    # as torch.multinomial draws, but without the kernels of its checks
    race = best.softmax(-1) / torch.empty_like(best).exponential_()
    return tokens.gather(-1, race.argmax(-1, keepdim=True))


def run_region(region: torch.nn.Module, *args: Any, **inputs: Any) -> Any:
    return type(region).forward(region, *args, **inputs)


def signature(region: torch.nn.Module) -> str:
    """Equal for modules that do the same with other tensors: all but their numbers and place in the model."""
    kinds = bool, int, float, str, slice, tuple, list, dict, type(None), torch.dtype, types.FunctionType
    found = []
    for name, module in region.named_modules():
        held = {
            k: v for k, v in vars(module).items() if k[0] != "_" and k != "layer_idx" and isinstance(v, kinds)
        }
        tensors = {**module._parameters, **module._buffers}.items()
        forms = [(k, v.shape, v.stride(), v.dtype) for k, v in tensors if v is not None]
        found.append((name, type(module), held, forms))
    return str(found)


def regions_of(model: Any, cache: StaticCache) -> list[tuple[torch.nn.Module, StaticCache | None]]:
    """What of a model is worth compiling; empty for a decoder that is built otherwise.

    Its layers, each with a cache that is its own at every index, the modules beside them (norms, positions)
    and the output layer.
    """
    output = model.get_output_embeddings()
    for decoder in model.modules():
        children = list(decoder.children())
        layers = next((c for c in children if isinstance(c, torch.nn.ModuleList)), ())
        indices = [{m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")} for layer in layers]
        if len(layers) != len(cache.layers) or any(own - {i, None} for i, own in enumerate(indices)):
            continue
        found = [(c, None) for c in children if not isinstance(c, torch.nn.ModuleList | torch.nn.Embedding)]
        found += [(output, None)] if isinstance(output, DequantLinear) else []
        for layer, own in zip(layers, cache.layers, strict=True):
            found.append((layer, copy.copy(cache)))
            found[-1][1].layers = [own] * len(layers)
        return found
    return []


class DecodeStep:
    """This script's step: what generate() calls for each token after the first, and what that needs."""

    def __init__(self, model: Any, max_tokens: int) -> None:
        self.model = model
        self.graphs = {}
        self.own_attention = model.config._attn_implementation
        sizes = range(WINDOW, max_tokens + WINDOW, WINDOW)
        self.places = torch.arange(sizes[-1], device=model.device)
        self.windows = {size: self.places[:size].clone() for size in sizes}
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self.position = torch.zeros(1, dtype=torch.long, device=model.device)
        self.ended = torch.zeros(1, dtype=torch.bool, pin_memory=model.device.type == "cuda")
        self.cache = StaticCache(config=model.config, max_cache_len=1)
        # 16 more, so that the cache is never as long as a window: equal sizes would be taken for one
        self.cache.layers = [StepLayer(sizes[-1] + 16, self.position) for _ in self.cache.layers]
        self.stepping = False
        self.regions = regions_of(model, self.cache)

    def step(self, window: torch.Tensor) -> Any:
        mask = (window <= self.position)[None, None, None]
        torch._dynamo.maybe_mark_dynamic(mask, 3)  # one graph serves all windows
        inputs = {"attention_mask": mask, "position_ids": self.position[None], "past_key_values": self.cache}
        self.stepping = True
        try:
            return self.model.forward(input_ids=self.token, **inputs, use_cache=True)
        finally:
            self.stepping = False

    def agrees(self) -> bool:
        """Whether the model answers the same by this step as by itself, for some prompt and a token.

        Rounding alone can move a nonsense prompt's logits by half, so one prompt suffices; a wrong
        step agrees on none.
        """
        config, device = self.model.config, self.model.device
        vocabulary = config.get_text_config().vocab_size
        try:
            for start in (vocabulary // 2, vocabulary // 3, vocabulary // 5, 2):
                ids = torch.arange(start, start + 9, device=device)[None]
                prompt, mask = ids[:, :-1], self.prompt_mask(ids[:, :-1, None])
                config._attn_implementation = self.own_attention
                wanted = self.model(ids, use_cache=False).logits[0, -2:].float()
                config._attn_implementation = "qwquanto"
                first = self.model(prompt, attention_mask=mask, past_key_values=self.cache, use_cache=True)
                self.token.copy_(ids[:, -1:])
                self.position.fill_(prompt.shape[1])
                then = self.step(self.windows[WINDOW])
                found = torch.cat([first.logits[0, -1:], then.logits[0, -1:]]).float()
                if (found - wanted).norm() < 0.1 * wanted.norm():
                    return True
        except (Failure, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            pass  # the model asks its attention for something that this one does not know
        config._attn_implementation = self.own_attention
        return False

    def compile(self) -> None:
        """Have the step's regions compiled at their first call, and generate() use the step.

        Regional compilation, as PyTorch's recipe of that name has it: all layers as one graph took two to
        four times as long to compile. A call of a region costs a CPU some 20 us, and a GPU nothing, since its
        graph is replayed.
        """
        options = INDUCTOR_OPTIONS | {
            "triton.enable_pdl": self.model.device.type == "cuda" and supports_pdl()
        }
        # guards on shapes alone: nothing else changes here
        options["guard_filter_fn"] = lambda guards: [guard.guard_type == "SHAPE_ENV" for guard in guards]
        compiled: dict[str, Callable] = {}
        for region, cache in self.regions:
            key = signature(region)
            if key not in compiled:
                # code of its own: Dynamo files graphs under the code, and no guard tells two regions apart
                code = run_region.__code__.replace(co_name=f"region_{id(self)}_{len(compiled)}")
                function = types.FunctionType(code, globals())
                compiled[key] = torch.compile(function, fullgraph=True, options=dict(options))
            run = functools.partial(self.run, region, region.forward, compiled[key], cache)
            region.forward = run
        self.model.create_masks_for_generate = self.prompt_mask
        # generate() looks its loop up in the class
        kind = type(self.model)
        loop = lambda model, *args, **options: self.sample(*args, **options)
        self.model.__class__ = type(kind.__name__, (kind,), {"_sample": loop, "__module__": kind.__module__})

    def run(
        self,
        region: torch.nn.Module,
        eager: Callable,
        compiled: Callable,
        cache: StaticCache | None,
        *args: Any,
        **inputs: Any,
    ) -> Any:
        """A region's forward: eager for a prompt, compiled in a step, then with the layer's own cache."""
        if not self.stepping:
            return eager(*args, **inputs)
        own = {name: cache if value is self.cache else value for name, value in inputs.items()}
        return compiled(region, *args, **own)

    def decode(self, token: torch.Tensor, length: int) -> torch.Tensor:
        """Logits [1, 1, vocabulary] after a token [1, 1], the last of `length`; on CUDA till called again."""
        size = -(-length // WINDOW) * WINDOW
        self.token.copy_(token)
        self.position.fill_(length - 1)
        if size not in self.graphs:
            return self.step(self.windows[size]).logits
        graph, output = self.graphs[size]
        graph.replay()
        return output.logits

    def sample(
        self,
        tokens: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **inputs: Any,
    ) -> Any:
        """generate()'s loop for this step, in place of transformers' own (generation/utils.py, _sample).

        On CUDA the next step is under way before the host knows whether this token was the last: the GPU does
        not wait, and at the end of an answer one step is in vain. With top_k, a token is drawn among those k,
        not among the vocabulary. Both together made int8 10 % faster on an H100.
        """
        config = generation_config
        scores, logits = (), ()
        top_k = logits_processor[-1] if config.do_sample and logits_processor else None
        if not isinstance(top_k, transformers.TopKLogitsWarper) or config.output_scores:
            top_k = None
        processors = type(logits_processor)(logits_processor[:-1]) if top_k else logits_processor
        found = self.model._prefill(tokens, config, inputs, is_first_iteration=True).logits
        while True:
            raw = found[:, -1].to(torch.float32, copy=True)
            processed = processors(tokens, raw)
            token = draw_token(processed, config.do_sample, top_k and top_k.top_k)
            tokens = torch.cat([tokens, token], -1)
            scores += (processed,) * bool(config.output_scores)
            logits += (raw,) * bool(config.output_logits)
            if streamer:
                streamer.put(token[0].cpu())
            ended = stopping_criteria(tokens, scores)
            if tokens.shape[1] >= config.max_length:
                break
            if self.graphs:
                ended = self.ended.copy_(ended, non_blocking=True)
                copied = torch.cuda.current_stream(token.device).record_event()
                found = self.decode(token, tokens.shape[1])
                copied.synchronize()
            elif not ended:
                found = self.decode(token, tokens.shape[1])
            if ended:
                break
        if streamer:
            streamer.end()
        if not config.return_dict_in_generate:
            return tokens
        kept = {"scores": scores or None, "logits": logits or None, "past_key_values": self.cache}
        return GenerateDecoderOnlyOutput(sequences=tokens, **kept)

    @torch.no_grad()
    def capture_graphs(self) -> None:
        """Capture a CUDA graph for each window, once the step has been compiled by a first run."""
        pool = torch.cuda.graph_pool_handle()
        for size, window in self.windows.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                output = self.step(window)
            self.graphs[size] = graph, output

    def prompt_mask(self, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        length = inputs_embeds.shape[1]
        return (self.places[: -(-length // WINDOW) * WINDOW] <= self.places[:length, None])[None, None]


transformers.AttentionInterface.register("qwquanto", window_attention)


def static_cache(model: Any, max_tokens: int) -> StaticCache:
    """transformers' static cache of full length in every layer. Raises Failure where transformers has none.

    Sliding windows are left to the mask: StaticSlidingWindowLayer counts in Python (cache_utils.py:541), and
    every token would compile anew.
    """
    try:
        cache = StaticCache(config=model.config, max_cache_len=max_tokens)
    except Exception as error:
        raise Failure(
            f"{NOT_COMPILED}: it has no static cache ({type(error).__name__}): {LEAVE_OUT}"
        ) from error
    if not cache.is_compileable or not model._supports_default_dynamic_cache():
        raise Failure(f"{NOT_COMPILED}: its cache is of its own kind: {LEAVE_OUT}")
    return cache


def check_compilable(model: Any, max_tokens: int) -> None:
    """Raise Failure for a model that is compiled already, or that neither way can compile."""
    if "_prepare_cache_for_generation" in vars(model):
        raise Failure("this model's decode is compiled already: load it anew to compile it for other lengths")
    if len({str(p.device) for p in model.parameters()}) > 1:
        raise Failure(f"--compile needs the model on one device, it is spread over several: {LEAVE_OUT}")
    if model.config.is_encoder_decoder:
        raise Failure(f"{NOT_COMPILED}: it is no causal language model: {LEAVE_OUT}")
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings") or max_positions(model.config)
    # Phi-3's prepare_inputs_for_generation (modeling_phi3.py) drops the cache where the frequencies change
    if rope.get("rope_type") == "longrope" and max_tokens > limit:
        raise Failure(
            f"this model's positions change after {limit} tokens (longrope): compile it for at most that many"
        )


def begin_with(model: Any, cache: StaticCache, max_tokens: int) -> None:
    """Have every generate() begin with an empty cache, and refuse what was not compiled."""
    prepare = model._prepare_cache_for_generation

    def begin(generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, *rest: Any) -> Any:
        mask = model_kwargs.get("attention_mask")
        if model_kwargs.get("past_key_values") is not cache:
            raise Failure("a compiled model's generate() needs the options that compile_decode returned")
        if batch * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1) > 1:
            raise Failure("compiled decode takes one sequence at a time, and no beams")
        if mask is not None and not mask.all():
            raise Failure("compiled decode takes no padding: leave the padded places out")
        if generation_config.max_length > max_tokens:
            wanted = f"prompt and max_new_tokens make {generation_config.max_length} tokens"
            raise Failure(f"{wanted}, but this model's decode was compiled for {max_tokens}")
        cache.reset()
        return prepare(generation_config, model_kwargs, mode, batch, *rest)

    model._prepare_cache_for_generation = begin


def graphs_compiled() -> int:
    """Graphs that Dynamo has captured in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
def prepare_compiled_decode(model: Any, max_tokens: int) -> CompiledDecode:
    """Compile a loaded model's decode step for up to `max_tokens` of prompt and answer; once a model.

    Changes the model: afterwards its generate() needs CompiledDecode.options. Raises Failure for a model that
    cannot be compiled. Takes from seconds to minutes.
    """
    max_tokens = max(max_tokens, 16)
    before = graphs_compiled()
    check_compilable(model, max_tokens)
    cache = static_cache(model, max_tokens)
    step = None
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # where Triton launches and graphs are captured
    ordinary = model._supports_attention_backend and {type(layer) for layer in cache.layers} == {StaticLayer}
    # the "dynamic" frequencies depend on the data: a whole step cannot be traced
    ordinary &= "dynamic" not in str(getattr(model.config.get_text_config(), "rope_parameters", None))
    if not ordinary and not model._can_compile_fullgraph:
        raise Failure(f"{NOT_COMPILED}: {LEAVE_OUT}")
    swap_layers(model)
    try:
        merge_layers(model)
    except AttributeError as error:
        raise Failure(
            f"this model's code reads its layers' weights by itself ({error}): {LEAVE_OUT}"
        ) from error
    if ordinary:
        step = DecodeStep(model, max_tokens)
        step = step if step.regions and step.agrees() else None
    # what transformers refuses to compile: quantizers/base.py, is_compileable
    model.hf_quantizer = None
    model.generation_config.cache_implementation = None  # Gemma's; this cache is given to generate() as it is
    if step:
        cache = step.cache
        step.compile()
    else:
        slides = lambda layer: type(layer) is StaticSlidingWindowLayer
        cache.layers = [StaticLayer(max_tokens) if slides(layer) else layer for layer in cache.layers]
        if not model._can_compile_fullgraph:
            raise Failure(f"{NOT_COMPILED}: {LEAVE_OUT}")
        options = INDUCTOR_OPTIONS | {"triton.cudagraphs": model.device.type == "cuda"}
        compiled = torch.compile(model.__call__, options=options)
        model.get_compiled_call = lambda config: compiled
    begin_with(model, cache, max_tokens)
    options = {"past_key_values": cache, "compile_config": transformers.CompileConfig()}
    options["compile_config"]._compile_all_devices = True  # generation/utils.py, _valid_auto_compile_criteria
    ids = torch.full((1, 4), 2, device=model.device)
    model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    if graphs_compiled() == before:
        raise Failure(f"torch.compile compiled nothing of this model: {LEAVE_OUT}")
    if step and not step.agrees():  # a difference between two layers that `signature` does not see
        raise Failure(f"compiled, this model answers otherwise: {LEAVE_OUT}")
    if step and model.device.type == "cuda":
        step.capture_graphs()
    return CompiledDecode(OWN_STEP if step else STATIC_CACHE, graphs_compiled() - before, options)


def compile_decode(model: Any, max_tokens: int) -> dict[str, Any]:
    """For your own program: compile a loaded model's decode, and have the options that generate() then needs.

        options = qwquanto.compile_decode(model, max_tokens=512)
        ids = model.generate(ids, max_new_tokens=200, **options)

    The model may be quantized by Quanto or not; bf16, fp16 or fp32; on the CPU or one GPU. Once a model; see
    `prepare_compiled_decode`.
    """
    return prepare_compiled_decode(model, max_tokens).options


# ---------------------------------------------------------------------------------------------------- timing


@dataclass
class Bench:
    """One configuration on its devices: what its generations need, filled while it is set up."""

    settings: Settings
    devices: list[str] = field(default_factory=lambda: ["cpu"])
    handles: dict[str, Any] = field(default_factory=dict)  # device -> NVML's
    advice: str = SMALLER  # for a lack of memory
    model: Any = None
    tokenizer: Any = None
    prompt: Any = None  # token ids, shape [1, prompt tokens]
    new_tokens: int = 0  # at most; exactly, in a comparison
    positions_left: float = 0  # that the model has after the prompt
    left_out_cudnn: bool = False  # its attention, see `leave_out_cudnn_attention`
    compiled: Any = None  # the CompiledDecode, once there is one


def generation_options(bench: Bench) -> dict[str, Any]:
    """generate()'s options. max_new_tokens, as Qwen2.5's generation_config makes it ignore max_length."""
    s = bench.settings
    options = {"max_new_tokens": bench.new_tokens, "do_sample": s.do_sample}
    if s.do_sample:
        options["temperature"] = s.temperature
    if s.compare:  # all of them: the end is ignored, not forbidden, which costs kernels for every token
        options["eos_token_id"] = None
    return options


def generate(
    bench: Bench, title: str, timeout_s: float = math.inf, least: int = 0, prompt: Any = None, **options: Any
) -> tuple[list[int], list[float], float]:
    """One generate(): the new tokens, seconds from its start until each of them, and until its end.

    It ends early after `timeout_s`, but has `least` tokens. The time of every token is taken by a stopping
    criterion, which is called after sampling. On CUDA it records an event: waiting for the device would keep
    the host from launching the rest of the step (that and a heavier `peak_memory` cost a compiled token on an
    H100 4.6 %). On MPS it waits, since events are unreliable there (pytorch #196395), and is called once more
    than there are tokens (transformers generation/utils.py, DeferredStopCheck).
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
            status(f"{title}: {tokens} tokens, {tokens / seconds:.1f} tokens/s", done)
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
    with peak_memory(bench.devices, bench.handles) as peak:
        for i in range(count):
            left = duration((count - i) * median(r.latency_s for r in runs)) + " to go, " if runs else ""
            name = f"{kind}run {i + 1} of {count}"
            run = run_once(bench, bench.settings.seed + i, left + name)
            runs.append(run)
            result.memory["peak of runs" if target is result else "peak of compiled runs"] = peak()
            target.bandwidth_utilization = utilization(result, runs)
            save(result)
            tokens, rate = plural(run.generated_tokens, "token"), format_3g(run.decode_tokens_per_s)
            log(f"{name}: {tokens}, {rate} tokens/s, {run.latency_s:.1f} s")


def measure_prefill(bench: Bench, result: Result) -> None:
    """Tokens/s of prefill: random ids, three times after one that does not count; fewer if that is long."""
    config, rates = bench.model.config.get_text_config(), []
    tokens = min(PREFILL_TOKENS, max_positions(config) - 1)
    ids = torch.randint(10, config.vocab_size - 10, (1, tokens)).to(bench.prompt.device)
    begin = time.perf_counter()
    while not rates or (len(rates) < 4 and time.perf_counter() - begin < PREFILL_S):
        title = f"prefill of {tokens} tokens"
        _, (ttft_s,), _ = generate(bench, title, prompt=ids, max_new_tokens=1, do_sample=False)
        rates.append(tokens / ttft_s)
    result.prefill_rates = rates[1:] or rates
    result.prefill_tokens, result.prefill_tokens_per_s = tokens, median(result.prefill_rates)
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


# --------------------------------------------------------------------------------------------------- quality


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


# --------------------------------------------------------------------------------------------------- measure


def tokenize(s: Settings, tokenizer: Any, config: transformers.PreTrainedConfig) -> torch.Tensor:
    """The question's token ids, shape [1, tokens]; random ones with random weights. Raises Failure."""
    longest = max_positions(config)
    if tokenizer is None:
        torch.manual_seed(s.seed)
        ids = torch.randint(10, config.get_text_config().vocab_size - 10, (1, 16))
    elif not s.chat:
        ids = tokenizer(s.question, return_tensors="pt").input_ids
    elif getattr(tokenizer, "chat_template", None):
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        ids = tokenizer.apply_chat_template([{"role": "user", "content": s.question}], **options).input_ids
    else:
        raise Failure(f"{s.model_name} has no chat template: it is no chat model; leave --chat out")
    most = (longest if s.compare else min(longest, s.max_length)) - 1
    if not 0 < ids.shape[1] <= most:
        limit = "the model allows" if most == longest - 1 else "MAX_LENGTH allows"
        raise Failure(f"the question has {ids.shape[1]} tokens; {limit} 1 to {most}")
    return ids


def set_up(bench: Bench, result: Result, on_terminal: bool) -> tuple[str | None, Any]:
    """All that can fail before loading: device, files, question; returns the folder and the meta model.

    A Result that names the folder already has it from a worker before.
    """
    s = bench.settings
    result.concerns_all = True
    with step("looking for a device"):
        bench.devices, notes = choose_devices(s.device)
        result.devices = bench.devices
        result.notes = notes + busy_note("at the start")
        for note in result.notes:
            log(note)
    with step("getting the model", timeout_s=None):
        folder = result.folder or download_model(s.model_name, s.random_weights, not on_terminal)
        result.folder = folder
        stored = check_checkpoint(s, folder, bench.devices[0]) if folder else None
        if not s.random_weights:
            bench.tokenizer = load_tokenizer(s.model_name, folder, s.trust_remote_code)
    with step("reading the model's configuration"):
        meta_model = make_meta_model(s, folder)
        bench.prompt = tokenize(s, bench.tokenizer, meta_model.config)
        result.concerns_all = False
        place_model(bench, meta_model, stored)
        bench.handles, notes = nvml_handles(bench.devices)
        result.devices = bench.devices
        result.notes = result.notes + notes
        result.environment = describe_environment(bench.devices, bench.handles)
    with step("measuring the memory's bandwidth"):
        result.memory_bytes_per_s = {device: memory_bandwidth(device) for device in bench.devices}
        # the measurement's own tensors; torch.cuda's does nothing without CUDA
        (torch.mps if bench.devices == ["mps"] else torch.cuda).empty_cache()
        result.memory["before load"] = snapshot(bench.devices, bench.handles)
        save(result)
    return folder, meta_model


def load(bench: Bench, result: Result, folder: str | None, meta_model: Any) -> None:
    """Load the model and ready it for its runs; time, memory and weights go into the Result."""
    s = bench.settings
    with step("loading the model", timeout_s=None):
        bench.left_out_cudnn = leave_out_cudnn_attention(s.quanto_kernels)
        begin = time.perf_counter()
        with peak_memory(bench.devices, bench.handles) as peak:
            bench.model = load_model(s, folder, meta_model, bench.devices)
            synchronize(bench.devices)
            result.load_s = time.perf_counter() - begin
            result.memory |= {"after load": snapshot(bench.devices, bench.handles), "peak of load": peak()}
        for name, value in weight_stats(bench.model, bench.devices).items():
            setattr(result, name, value)
        result.bytes_per_token = decode_weight_bytes(bench.model)
        save(result)
    with step("running the model"):
        bench.prompt = bench.prompt.to(bench.model.get_input_embeddings().weight.device)
        tokens = bench.prompt.shape[1]
        bench.positions_left = max_positions(bench.model.config) - tokens
        bench.new_tokens = min(s.compare_tokens if s.compare else s.max_length - tokens, bench.positions_left)
        # what generate() ends up with, its hidden defaults (top_k = 50) included
        used, _ = bench.model._prepare_generation_config(None, **generation_options(bench))
        result.generation = {name: getattr(used, name, None) for name in GENERATION}


def measure_compiled(bench: Bench, result: Result, reference: Path | None) -> None:
    """Ready this script's compiled decode step, time it and hold its answers against the reference too."""
    s = bench.settings
    tokens = bench.prompt.shape[1]
    judged = min(s.quality_tokens, bench.positions_left) if reference else 0
    longest = tokens + max(bench.new_tokens, judged)
    log(f"compiling the decode step for up to {longest} tokens: this takes half a minute or so")
    with step("compiling the decode step"):
        begin = time.perf_counter()
        bench.compiled = prepare_compiled_decode(bench.model, longest)
        seconds = time.perf_counter() - begin
        result.compiled = Compiled(bench.compiled.way, seconds, bench.compiled.graphs)
        save(result)
    with step("running the compiled model"):
        result.compiled.warmup, graphs = warmup_runs(bench), graphs_compiled()
        timed_runs(bench, result, result.compiled, s.runs)
        result.compiled.recompilations = graphs_compiled() - graphs
    if reference:
        with step("measuring the compiled model's quality"):
            result.compiled.quality = measure_quality(bench, result, reference)
            save(result)


def measure(result: Result, reference: str | None, on_terminal: bool = False, debug: bool = False) -> None:
    """Load and measure one configuration into `result`; a failure becomes a field of it.

    `reference` is the folder for the answer that quality is judged on, of a comparison.
    """
    s = result.settings
    bench = Bench(result.settings)
    reference = Path(reference) if reference and s.quality_tokens and not s.random_weights else None
    try:
        load(bench, result, *set_up(bench, result, on_terminal))
        with step("running the model"):
            result.warmup = warmup_runs(bench)
            # without a comparison, eager is only the compiled step's baseline: one run
            timed_runs(bench, result, result, 1 if s.compile and not s.compare else s.runs)
            result.kernels, result.kernel_s = profile_a_step(bench)
            result.cudnn_attention_s = cudnn_attention(bench)
            result.defects = quanto_defects(bench.model) if s.weights else {}
        with step("measuring prefill"):
            measure_prefill(bench, result)
        if reference:
            with step("measuring quality"):
                result.quality = measure_quality(bench, result, reference)
        result.eager_complete = True
        save(result)
        if s.compile and s.compare and s.weights == "int8":
            with step("trying torch.compile(model) as written", timeout_s=TORCH_COMPILE_S):
                try_torch_compile(bench, result)
        if s.compile:  # last: it changes the model, and may fail
            measure_compiled(bench, result, reference)
        result.notes += busy_note("at the end")
        result.complete = True
    except Exception as error:  # whatever it is becomes the Result's failure
        if debug:
            traceback.print_exc()
        result.failure, result.unavailable = describe_error(error, bench.advice)
    save(result)


if __name__ == "__main__":
    job = JOBS.get()
    warnings.filterwarnings("default" if job["debug"] else "ignore")
    started = Result(Settings(**job["settings"]), job["folder"])
    measure(started, job["reference"], job["on_terminal"], job["debug"])
