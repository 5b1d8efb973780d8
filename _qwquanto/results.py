"""What was measured, each figure's field and unit, to JSON and back. Imports settings."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _qwquanto import __version__
from _qwquanto.channel import Failure
from _qwquanto.settings import SHORT_DTYPES, Settings

SCHEMA = 2  # of the JSON; raise it only when a field gets another meaning: a new one has a default
READERS = {1: "qwquanto 2.0.0"}  # earlier schemas -> the version that reads them


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
    others_cpu: float | None = None  # share of the CPU that other programs used; None on other devices
    text: str = ""


@dataclass
class Quality:
    """One model against the reference, over `positions` tokens of the latter's text. KL in nats.

    The lists hold each position, prompt by prompt; QUALITY_TEXT is cut into up to sixteen parts instead.
    """

    reference: str  # its precision
    positions: int
    kl_divergence: float  # mean of the prompts' means
    kl_standard_error: float | None  # over prompts; None for one prompt
    kl_p99: float
    same_top_token: float
    low: float | None  # 95 % interval of same_top_token, over prompts; None where they are all alike
    high: float | None
    kl_positions: list[list[float]] = field(default_factory=list)
    same_positions: list[list[bool]] = field(default_factory=list)
    text_id: str = ""  # of the reference's tokens: equal for equal ones
    perplexity: float | None = None  # of the text, and the reference's
    reference_perplexity: float | None = None
    same_greedy_tokens: int | None = None  # the first so many of the reference's greedy answer
    greedy_tokens: int | None = None  # the reference's


@dataclass
class Compiled:
    """This script's compiled decode step: seconds it took to prepare, its graphs, and its measurements."""

    way: str  # SCRIPT_STEP or STATIC_CACHE
    seconds: float
    graphs: int
    recompilations: int = 0  # within timed runs
    step_s: float | None = None  # that the GPU needs for a step of CUDA graphs; None without graphs
    warmup: list[Run] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)  # before, between and after the runs
    throttled: dict[str, float] = field(default_factory=dict)  # reason -> share of the runs' time
    bandwidth_utilization: float | None = None
    quality: Quality | None = None


@dataclass
class Passage:
    """Token ids: a prompt, and what follows on it where models are held against each other."""

    prompt: list[int]
    tokens: list[int]
    part: int = 0  # number of the prompt; an answer that ended early is followed by another one


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
    device_memory_bytes: dict[str, int] = field(default_factory=dict)  # device -> bytes that it has
    kv_bytes_per_token: float | None = None  # of the eager cache; None where not every layer grows alike
    max_positions: int | None = None  # tokens that the model takes; None: no limit is known
    warmup: list[Run] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)  # eager
    host_s: list[float] = field(default_factory=list)  # a fixed job, around the runs; empty on a CPU
    throttled: dict[str, float] = field(default_factory=dict)  # reason -> share of the runs' time, see NVML
    bytes_per_token: int | None = None  # weights that a decode step reads, see `decode_weight_bytes`
    memory_bytes_per_s: dict[str, float] = field(default_factory=dict)  # device -> bytes/s
    bandwidth_utilization: float | None = None
    compiled: Compiled | None = None
    torch_compile_graphs: int | None = None  # that torch captured of `torch.compile(model)` as written
    prefill_tokens: int | None = None
    prefill_tokens_per_s: float | None = None
    prefill_rates: list[float] = field(default_factory=list)
    decode_after_prefill_tokens_per_s: float | None = None  # of the tokens after that prompt
    decode_after_prefill_ratio: float | None = None  # that rate over one after the question, in turn with it
    is_reference: bool = False
    passages: list[Passage] = field(default_factory=list)  # the reference's, on which quality is judged
    greedy_answer: str | None = None
    quality: Quality | None = None
    notes: list[str] = field(default_factory=list)
    failure: str | None = None
    unavailable: bool = False  # the failure: this machine lacks something that it needs
    ends_comparison: bool = False  # the failure is the model's or the device's, whatever the precision
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


def reference_of(results: list[Result]) -> str:
    """The name of the precision that the others' answers are held against."""
    return next((r.label for r in results if r.is_reference), "the reference")


@dataclass
class Benchmark:
    """What one call of the script measured: the content of its JSON file."""

    results: list[Result]
    interrupted: bool = False
    date: str = field(
        default_factory=lambda: datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    )
    version: str = __version__
    command: str = ""  # as it was typed
    schema: int = SCHEMA

    @property
    def described(self) -> Result:
        """The first Result that knows the machine, else the first."""
        return next((r for r in self.results if r.environment), self.results[0])


def to_json(benchmark: Benchmark) -> str:
    return json.dumps(dataclasses.asdict(benchmark), ensure_ascii=False, indent=1, allow_nan=False)


NESTED = {"results": Result, "settings": Settings, "warmup": Run, "runs": Run, "compiled": Compiled,
          "quality": Quality, "passages": Passage}  # fmt: skip


def has_gap(figure: Any) -> bool:
    """Whether a figure, or one of a list of them, is unknown."""
    return any(map(has_gap, figure)) if isinstance(figure, list) else figure is None


def lacks_figure(kind: type, plain: dict[str, Any]) -> bool:
    """Whether a run or a judgement lacks one of the figures that it always has."""
    if kind not in (Run, Quality):
        return False
    kinds = ("float", "list[float]", "list[list[float]]")
    always = [f.name for f in dataclasses.fields(kind) if f.type in kinds]
    return any(has_gap(plain[name]) for name in always if name in plain)


def from_plain(kind: type, plain: dict[str, Any]) -> Any:
    """The dataclass that `asdict` made this of; fields that a later version wrote are ignored.

    What lacks a figure that it always has is left out (`lacks_figure`); None if that is this one itself.
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
        elif name in ("memory_bytes_per_s", "throttled"):
            known[name] = {key: figure for key, figure in value.items() if figure is not None}
        elif name == "host_s":
            known[name] = [seconds for seconds in value if seconds is not None]
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


class ResultsFile:
    """The file of a Benchmark, written whenever a Result of it has grown; none if `path` is None or -."""

    def __init__(self, path: str | None, benchmark: Benchmark) -> None:
        self.path = None if path == "-" else path
        self.benchmark = benchmark
        self.problems: list[str] = []  # of the latest writing

    def save(self, result: Result | None = None) -> None:
        """Take a Result in place of its former self, and write them all."""
        results = self.benchmark.results
        if result:
            results[:] = [r for r in results if r.name != result.name] + [result]
        if self.path is None or not results:
            return
        try:
            write_results(self.path, self.benchmark)
            self.problems = []
        except OSError as error:
            self.problems = [f"cannot write {self.path}: {error.strerror or error}"]
