#!/usr/bin/env python
"""What does Quanto do to my model on my machine, and does it keep its promises?

Loads a causal language model quantized by Hugging Face's Quanto, runs one question five times and reports speed,
memory and, in a comparison, quality.

    python qwquanto.py                    # the model and the precision of the constants below
    python qwquanto.py --random-weights   # the same modules, bytes and speed, and nothing to download
    python qwquanto.py --compare          # none, float8, int8, int4 and int2 beside each other

Every number, as the report names it (the JSON has them in seconds and bytes, null where unknown):

    TTFT             time to first token: from the call of generate() until the first new token is sampled
    decode tokens/s  (new tokens - 1) / (time of the last token - time of the first): N tokens have N-1 intervals
    inter-token      the gaps between tokens; percentiles pool all timed runs
    latency          the whole generate() call, device synchronized at both ends
    tokens/s         new tokens / latency: the plain figure that most scripts print
    prefill          512 prompt tokens / time to first token (llama-bench's pp512), a measurement of its own
    weights          stored bytes of parameters and buffers, seen through Quanto's wrappers, tied tensors once
    saved            1 - weights / the same model unquantized, in the dtype it is loaded in
    allocated        bytes in torch's tensors; reserved: what torch's allocator holds; used: the whole device (NVML)
    RSS              physical memory of this process: mapped files and freed heap count too, so it is not the model
    MBU              memory bandwidth utilization: bytes that decode must read a second (weights + KV cache) over
                     what this device's memory delivers, measured before the model is loaded
    energy           difference of the GPU's own energy counter over a run of at least one second
    KL               mean KL(unquantized || quantized) in nats over the unquantized model's greedy answer
    same top token   share of those positions at which both models rank the same token first, 95 % Wilson interval

Timed runs follow warm-up runs; run i is seeded with SEED + i. Decode of a language model at batch size one reads every
weight once a token, so memory bandwidth is its ceiling: MBU says how near it is.
"""

from __future__ import annotations

# ------------------------------------------------------------------------------------------------- constants
# Edit these; each is also a flag: MAX_LENGTH = --max-length.
MODEL_NAME: str = "Qwen/Qwen2.5-3B"  # Hub id or local folder: "Qwen/Qwen2.5-7B", "./my-model"
WEIGHTS: str | None = "int8"  # "float8", "int8", "int4", "int2", or None: as stored (--weights none)
COMPARE: tuple = ()  # precisions to compare; --compare alone: none float8 int8 int4 int2
DEVICE: str = "auto"  # "cuda", "cuda:1", "mps", "cpu"; auto: what works, one GPU if the model fits it
DTYPE: str = "auto"  # the checkpoint's own; "float16" for GPUs before Ampere, "bfloat16", "float32"
COMPILE: bool = False  # compile the decode step (static cache, CUDA graphs): a minute or so at the start
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
# -----------------------------------------------------------------------------------------------------------

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

PRECISIONS = ("none", "float8", "int8", "int4", "int2")
BITS = {"none": 16, "float8": 8, "int8": 8, "int4": 4, "int2": 2}
ACTIVATION_SCALES = ("input_scale", "output_scale")  # of a Quanto layer; activations are not quantized here
PREFILL_TOKENS = 512  # as llama-bench's pp512
# A warm-up run ends when it has had both, and warm-up only after so many seconds: a GPU machine is slow at first.
WARMUP_TOKENS, WARMUP_S = 16, 5
# The author's choice, in nats of KL: below the first answers are kept, above the second they are broken.
KEEPS, BREAKS = 0.05, 0.5
BUSY = 20  # percent of the processor that others may use before it deserves a warning
UNSTABLE = 0.05  # standard deviation over mean of the runs' decode rates that deserves a warning
PROMISED = {  # by Quanto's documentation, against 16 bit
    "memory saved": "50-60 %", "16-bit speed": "90-95 %", "quality (KL)": "very close", "torch.compile": "+20-30 %",
}  # fmt: skip
SILENCE_S = 900  # a precision of a comparison that says nothing for so long is taken to hang
QWEN2_5_3B = {  # config.json of Qwen/Qwen2.5-3B, so that --random-weights needs no network
    "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "max_window_layers": 36,
    "use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151643, "dtype": "bfloat16",
}  # fmt: skip

# tell(text): a line for good; tell(text, live=True): a line that the next one replaces.
Tell = Callable[..., None]


class Failure(Exception):
    """What went wrong and what to do about it, in one line for the user."""


# -------------------------------------------------------------------------------------------------- settings

HINTS = {name: hint for name, hint in typing.get_type_hints(sys.modules[__name__]).items() if name.isupper()}
Settings = dataclasses.make_dataclass(
    "Settings", [(name.lower(), hint, globals()[name]) for name, hint in HINTS.items()], frozen=True
)
Settings.__doc__ = "A frozen snapshot of the constants: one field each, in lower case."
Settings.__module__ = __name__  # a spawned process finds the class where it is defined


def convert(text: str, hint: Any) -> Any:
    """The value that a flag's text means for a constant of this type, or the text itself: `check` will complain."""
    if text.lower() == "none" and type(None) in typing.get_args(hint):
        return None
    try:
        return hint(text) if hint in (int, float) else text
    except ValueError:
        return text


def parse(argv: list[str] | None = None) -> tuple[Settings, bool]:
    """Settings from the constants and their flags, and whether --debug was given; flags come from the constants."""
    source = Path(__file__).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z_]+): .*?  # (.+)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        "qwquanto.py", "python qwquanto.py [--FLAG VALUE ...]", __doc__.split("\n\n")[0], allow_abbrev=False
    )
    for name, hint in HINTS.items():
        flag, default = "--" + name.lower().replace("_", "-"), globals()[name]
        shown = f"{comments.get(name, '')} (now: {default})".replace("%", "%%")
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=shown)
        elif hint is tuple:
            parser.add_argument(flag, nargs="*", default=default, metavar="WEIGHTS", help=shown)
        else:
            to = lambda text, hint=hint: convert(text, hint)
            parser.add_argument(flag, type=to, default=default, metavar=name.split("_")[-1], help=shown)
    parser.add_argument("--debug", action="store_true", help="show tracebacks and libraries' messages")
    flags = vars(parser.parse_args(argv))
    debug = flags.pop("debug")
    if flags["compare"] == [] and flags["compare"] is not COMPARE:  # --compare alone
        flags["compare"] = PRECISIONS
    flags["compare"] = tuple(flags["compare"]) if isinstance(flags["compare"], list) else flags["compare"]
    return Settings(**flags), debug


def writable(path: str) -> bool:
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


def at_least(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda v: type(v) is int and v >= least, f"a whole number from {least} on"


ONE_OF = f"one of {', '.join(PRECISIONS)}"
DTYPES = ("auto", "float16", "bfloat16", "float32")
RULES = {  # constant -> does it hold, and what is allowed
    "MODEL_NAME": (is_model, "a Hub id like Qwen/Qwen2.5-3B or a folder with a config.json"),
    "WEIGHTS": (lambda v: (v or "none") in PRECISIONS, ONE_OF),
    "COMPARE": (
        lambda v: {p or "none" for p in v} <= set(PRECISIONS) and len(set(v)) == len(v),
        f"precisions, each of them {ONE_OF}, and once",
    ),
    "DEVICE": (lambda v: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v), "auto, cuda, cuda:N, mps or cpu"),
    "DTYPE": (lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "QUESTION": (lambda v: v.strip(), "some text"),
    "RUNS": at_least(1),
    "WARMUP_RUNS": at_least(0),
    "MAX_LENGTH": at_least(2),
    "MAX_SECONDS": (lambda v: 0 < v < math.inf, "a number above 0"),
    "COMPARE_TOKENS": at_least(2),
    "QUALITY_TOKENS": at_least(0),
    "TEMPERATURE": (
        lambda v: 0 < v < math.inf,
        "a number above 0 (for greedy decoding set DO_SAMPLE to False)",
    ),
    "SEED": at_least(0),
    "RESULTS": (lambda v: v in (None, "-") or writable(v), "a file that can be written, or -"),
}


def check(s: Settings) -> list[str]:
    """Everything that is impossible about the settings, each with what is allowed; imports no library."""
    is_bool = (lambda v: type(v) is bool, "True or False")
    rules = {name: is_bool for name, hint in HINTS.items() if hint is bool}
    problems = []
    for name, (holds, allowed) in (RULES | rules).items():
        value = getattr(s, name.lower())
        try:
            right = holds(value)
        except (TypeError, AttributeError, RuntimeError):  # a constant edited to another type, ~nobody/model
            right = False
        if not right:
            problems.append(f"{name} must be {allowed}, not {value!r}")
    return problems


# --------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Quality:
    """One quantized model against the unquantized one, over `positions` tokens of the latter's greedy answer."""

    positions: int
    kl_divergence: float
    same_top_token: float
    low: float  # 95 % Wilson interval of same_top_token
    high: float


@dataclass(frozen=True)
class Compiled:
    """What torch.compile did: seconds to prepare, compile and record; graphs; recompilations within timed runs."""

    seconds: float
    graphs: int
    recompilations: int = 0


@dataclass(frozen=True)
class Result:
    """Everything known about one configuration; grows while it is measured. Bytes and seconds, None: unknown."""

    settings: Settings
    environment: dict[str, str] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    generation: dict[str, Any] = field(default_factory=dict)  # what generate() really used
    load_s: float | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    unquantized_bytes: int | None = None
    quantizable_bytes: int | None = None  # of the unquantized bytes, those in layers that Quanto quantizes
    quantized_layers: int | None = None
    linear_layers: int | None = None
    weight_types: dict[str, int] = field(default_factory=dict)  # Quanto's tensor class -> layers
    memory: dict[str, dict[str, int]] = field(default_factory=dict)  # phase -> name -> bytes, see `snapshot`
    warmup: list[Run] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    eager_runs: list[Run] = field(default_factory=list)  # a compiled comparison measures the eager model too
    compiled: Compiled | None = None
    prefill_tokens: int | None = None
    prefill_tokens_per_s: float | None = None
    bytes_per_token: int | None = None
    memory_bytes_per_s: dict[str, float] = field(default_factory=dict)  # device -> bytes/s
    bandwidth_utilization: float | None = None
    quality: Quality | None = None
    notes: list[str] = field(default_factory=list)
    failure: str | None = None
    unavailable: bool = False  # the failure is a lack of this machine

    @property
    def name(self) -> str:
        return self.settings.weights or "none"


def to_json(results: list[Result]) -> str:
    plain = {"results": [dataclasses.asdict(r) for r in results]}
    return json.dumps(plain, ensure_ascii=False, indent=1, allow_nan=False)


def write_results(path: str, results: list[Result]) -> None:
    """Write all numbers atomically: a reader, or a killed process, never leaves half a file."""
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(to_json(results) + "\n", encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------- machine


def choose_devices(wanted: str) -> tuple[list[str], list[str]]:
    """Devices that `wanted` (DEVICE) means here, and notes for the user; for auto and cuda all GPUs after those that fail.

    Raises Failure where the wanted device does not exist or does not work.
    """
    import torch

    notes, seen = [], nvml_names()
    if seen and not torch.cuda.is_available() and wanted != "cpu":
        reason = "the driver is too old for it, or CUDA_VISIBLE_DEVICES hides the GPU"
        if torch.version.cuda is None:
            index = "https://download.pytorch.org/whl/cu130"
            reason = f"install a CUDA build, pip install torch --index-url {index}"
        torch_here = f"this torch ({torch.__version__})"
        notes.append(f"NVIDIA's driver sees {seen[0]}, but {torch_here} cannot use it: {reason}")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    if wanted == "auto":
        candidates = [c for c in (gpus, mps, ["cpu"]) if c]
    else:
        found = {"cuda": gpus, "mps": mps, "cpu": ["cpu"]}.get(wanted, [wanted] if wanted in gpus else [])
        if not found:
            here = ", ".join([*gpus, *mps, "cpu"])
            raise Failure(f"there is no device {wanted} here (found: {here}). {' '.join(notes)}")
        candidates = [found]
    for devices in candidates:
        for i, device in enumerate(devices):
            try:
                torch.ones(2, device=device).sum().item()
                return devices[i:], notes  # the others are not touched: that alone takes 0.6 GiB of a GPU
            except RuntimeError as error:
                notes.append(f"{device} does not work: {first_line(error)}")
    raise Failure(notes[-1])


def busy_note() -> list[str]:
    """A note if other programs use the processor: decode beside one was a hundred times slower, and steadily so."""
    import psutil

    busy = psutil.cpu_percent(0.5)  # this process sleeps meanwhile
    return (
        [f"other programs use {busy:.0f} % of the processor: the speeds are too low"] if busy > BUSY else []
    )


def nvml_names() -> list[str]:
    """Names of the GPUs that NVIDIA's driver sees; empty without driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    except pynvml.NVMLError:
        return []


def nvml_handles(devices: list[str]) -> tuple[dict[str, Any], list[str]]:
    """NVML's handle of each CUDA device, and notes. By UUID: CUDA_VISIBLE_DEVICES renumbers, NVML does not."""
    import pynvml
    import torch

    handles, notes = {}, []
    for device in devices:
        if device.startswith("cuda"):
            try:
                pynvml.nvmlInit()
                uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                device_memory_used(handle)  # not every driver and device can tell
                handles[device] = handle
            except pynvml.NVMLError as error:
                reason = f"device memory in use and energy are unknown ({first_line(error)})"
                notes.append(f"no NVML for {device}: {reason}")
    return handles, notes


def device_memory_used(handle: Any) -> int:
    """Bytes in use by all programs, as nvidia-smi tells it: version 1 of NVML's call counts the driver's reserve too."""
    import pynvml

    return pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2).used


def energy_j(handles: dict[str, Any]) -> dict[str, float]:
    """Joules that each GPU has used since its driver was loaded (Volta and newer); empty where it does not count."""
    import pynvml

    try:
        return {d: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 for d, handle in handles.items()}
    except pynvml.NVMLError:
        return {}


def synchronizer(devices: list[str]) -> Callable[[], None]:
    """A function that waits for all work on all devices."""
    import torch

    gpus = [torch.device(d) for d in devices if d.startswith("cuda")]
    if gpus:
        return lambda: [torch.cuda.synchronize(gpu) for gpu in gpus] and None
    return torch.mps.synchronize if devices == ["mps"] else lambda: None


def environment(devices: list[str], handles: dict[str, Any]) -> dict[str, str]:
    """Hardware and versions: a benchmark's are part of its result."""
    import platform
    from importlib.metadata import version

    import psutil
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = named[0] if named else cpu
    told = {"cpu": f"{cpu}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    told["ram"] = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    for device in devices:
        if device.startswith("cuda"):
            told[device] = f"{torch.cuda.get_device_name(device)}, {memory_of(device)[1] / 2**30:.1f} GiB"
    if handles:
        import pynvml

        told["driver"] = pynvml.nvmlSystemGetDriverVersion()
    told |= {"os": f"{platform.system()} {platform.release()}", "python": platform.python_version()}
    packages = ("torch", "transformers", "optimum-quanto", "accelerate")
    told |= {package: version(package) for package in packages} | {"torch": torch.__version__}
    return told


def memory_bandwidth(device: str, size: int = 2**30) -> float:
    """Bytes a second that a device's memory delivers: the faster of a copy (read + written) and a read-only sum.

    `size` bytes, far beyond any cache; the best of several, since every disturbance only slows.
    """
    import torch

    synchronize = synchronizer([device])
    size = min(size, memory_of(device)[0] // 8)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for moved, job in ((2 * source.nbytes, lambda: target.copy_(source)), (source.nbytes, source.sum)):
        for _ in range(8):
            synchronize()
            begin = time.perf_counter()
            job()
            synchronize()
            best = max(best, moved / (time.perf_counter() - begin))
    return best


# ---------------------------------------------------------------------------------------------------- memory


def memory_of(device: str) -> tuple[int, int]:
    """Bytes that can still be taken on a device, and all it has: its own memory, or the computer's."""
    import psutil
    import torch

    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)
    return psutil.virtual_memory().available, psutil.virtual_memory().total


def snapshot(devices: list[str], handles: dict[str, Any]) -> dict[str, int]:
    """Bytes at this moment: "rss" of this process, and "cuda:0 allocated", "… reserved", "… used" (whole device)."""
    import torch

    told = {}
    for device in devices:
        if device.startswith("cuda"):
            told[f"{device} allocated"] = torch.cuda.memory_allocated(device)
            told[f"{device} reserved"] = torch.cuda.memory_reserved(device)
    return told | without_peak(devices, handles)


def without_peak(devices: list[str], handles: dict[str, Any]) -> dict[str, int]:
    """The part of a `snapshot` of which nobody keeps the peak."""
    import psutil
    import torch

    told = {f"{device} used": device_memory_used(handles[device]) for device in devices if device in handles}
    if devices == ["mps"]:
        told["mps allocated"] = torch.mps.current_allocated_memory()
        told["mps reserved"] = torch.mps.driver_allocated_memory()
    return told | {"rss": psutil.Process().memory_info().rss}


@contextmanager
def peak_memory(devices: list[str], handles: dict[str, Any]) -> Iterator[Callable[[], dict[str, int]]]:
    """Watches memory within the block; the function it yields tells the peaks so far, as `snapshot` does.

    torch's own CUDA peaks are exact. RSS, NVML and MPS keep no peak: a thread looks ten times a second.
    """
    import torch

    gpus = [device for device in devices if device.startswith("cuda")]
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    seen, ended = snapshot(devices, handles), threading.Event()

    def look() -> None:
        for name, value in without_peak(devices, handles).items():
            seen[name] = max(seen.get(name, 0), value)

    def watch() -> None:
        while not ended.wait(0.1):
            look()

    def peak() -> dict[str, int]:
        look()
        for gpu in gpus:
            seen[f"{gpu} allocated"] = torch.cuda.max_memory_allocated(gpu)
            seen[f"{gpu} reserved"] = torch.cuda.max_memory_reserved(gpu)
        return dict(seen)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def plain_tensors(tensor: Any) -> list:
    """The tensors that really hold a tensor's bytes.

    A Quanto weight is a wrapper that reports the size and dtype of the unquantized one: `nbytes`, `element_size` and
    `get_memory_footprint` are all wrong for it. `__tensor_flatten__` names what is inside.
    """
    tensor = getattr(tensor, "data", tensor)  # a Parameter hides the wrapper's methods
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [p for name in tensor.__tensor_flatten__()[0] for p in plain_tensors(getattr(tensor, name))]


def stored_bytes(tensors: Iterable) -> int:
    """Bytes stored for all of these tensors together, tied ones counted once."""
    plain = [p for tensor in tensors for p in plain_tensors(tensor) if p.numel()]
    return sum({(str(p.device), p.data_ptr()): p.nbytes for p in plain}.values())


# ----------------------------------------------------------------------------------------------------- model


def fetch(s: Settings) -> str | None:
    """The local folder of the model's files, downloaded if need be: the only place that touches the network.

    None for the built-in configuration. Raises Failure with what the Hub said and the ways on.
    """
    if s.random_weights and s.model_name == "Qwen/Qwen2.5-3B":
        return None
    if Path(s.model_name).expanduser().is_dir():
        return str(Path(s.model_name).expanduser())
    from huggingface_hub import errors, snapshot_download

    weights = [] if s.random_weights else ["*.safetensors"]
    try:
        for patterns in (["*.json", "*.txt", "*.model", "*.jinja", "*.py", *weights], ["*.bin"]):
            folder = snapshot_download(
                s.model_name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
            )
            if s.random_weights or any(Path(folder).glob("*.safetensors")):
                break
        return folder
    except errors.GatedRepoError:
        raise Failure(f"{s.model_name} is gated: accept its terms on its page, then: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise Failure(f"the Hub knows no model {s.model_name} (or it is private: hf auth login)") from None
    except Exception as error:  # the Hub's client raises its own, the operating system's and httpx's
        raise Failure(
            f"cannot get {s.model_name} from the Hub, and it is neither a folder nor cached here ({first_line(error)}). "
            "Ways on: a mirror (set HF_ENDPOINT=https://…), a local folder (--model-name ./folder), or no download "
            "(--random-weights)"
        ) from error


def check_checkpoint(folder: str) -> None:
    """Raises Failure naming the file that is missing or damaged; reads headers only."""
    import safetensors

    root = Path(folder)
    files = sorted(root.glob("*.safetensors"))
    index = root / "model.safetensors.index.json"
    if index.exists():
        files = [root / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not files and not list(root.glob("*.bin")):
        raise Failure(f"{folder} holds no weights (*.safetensors): download it again, or --random-weights")
    for file in files:
        try:
            safetensors.safe_open(file, "pt").keys()
        except (OSError, safetensors.SafetensorError) as error:
            raise Failure(f"{file} is missing or damaged ({first_line(error)}): download it again") from None


def stored_dtype(folder: str) -> Any:
    """The dtype of a checkpoint whose configuration names none, from its first file's header; None if unknown."""
    import safetensors
    import torch

    kinds = {"F16": torch.float16, "BF16": torch.bfloat16}
    for file in sorted(Path(folder).glob("*.safetensors"))[:1]:
        with safetensors.safe_open(file, "pt") as opened:
            names = opened.keys()
            found = (kinds.get(opened.get_slice(name).get_dtype()) for name in names)
            return next((dtype for dtype in found if dtype), None)
    return None


def skeleton(s: Settings, folder: str | None) -> Any:
    """The model without memory (on torch's meta device), in the dtype it will be loaded in."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if folder is None:
        config = AutoConfig.for_model(**QWEN2_5_3B)
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=s.trust_remote_code)
    own = config.dtype or (stored_dtype(folder) if folder else None) or torch.float32
    dtype = own if s.dtype == "auto" else getattr(torch, s.dtype)
    config.dtype = dtype
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=s.trust_remote_code)


def linear_names(model: Any) -> list[str]:
    """Names of the linear layers, as Quanto's transformers integration sees them: all but the output embedding."""
    import torch

    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]


def expected_bytes(model: Any, precision: str) -> int:
    """Bytes that the weights of a `skeleton` will take: 8-bit with a scale a row, fewer bits with two a group of 128."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    linear = [model.get_submodule(name).weight for name in linear_names(model)]
    total, per_scale = sum(t.nbytes for t in tensors.values()), model.dtype.itemsize
    if precision == "none":
        return total
    for weight in linear:
        scales = weight.shape[0] if BITS[precision] == 8 else 2 * weight.numel() / 128
        total += weight.numel() * BITS[precision] / 8 + scales * per_scale - weight.nbytes
    return int(total)


def random_state(model: Any) -> dict[str, Any]:
    """Random weights for a `skeleton`: one block of normal numbers over and over (filling 3 B anew takes a minute).

    A tied output embedding must be left out, or from_pretrained unties it in silence.
    """
    import torch

    torch.manual_seed(0)
    block = torch.randn(2**22, dtype=torch.float32).mul_(0.02).to(model.dtype)
    state, tied = {}, set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, tensor in model.state_dict().items():
        if name in tied or not tensor.is_floating_point():
            continue
        if tensor.ndim < 2:
            state[name] = torch.full(tensor.shape, float("norm" in name), dtype=tensor.dtype)
        else:
            flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
            for start in range(0, flat.numel(), block.numel()):
                flat[start : start + block.numel()] = block[: flat.numel() - start]
            state[name] = flat.view(tensor.shape)
    return state


def use_plain_kernels() -> None:
    """Keep Quanto from building C++ and CUDA extensions, and from losing biases. Seen in optimum-quanto 0.2.7.

    - tensor/weights/marlin/fp8/qbits.py:31: the float8 Marlin kernel takes a bias and never adds it, so on CUDA every
      model with biases answers wrong. Without "quanto_cuda" float8 takes quanto::qbytes_mm, right and nothing to build.
    - library/extensions/extension.py:47: `unpack` (int2; int4 in float16) compiles an extension of minutes, which a
      stale lock file makes hang, for what is one line of torch.
    """
    import types

    import optimum.quanto  # noqa: F401 (registers the extensions)
    import torch
    from optimum.quanto.library.extensions import extension

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    for registered in extension._extensions.values():
        registered._lib = types.SimpleNamespace(unpack=unpack)
    extension._extensions.pop("quanto_cuda", None)


def load(s: Settings, folder: str | None, empty: Any, devices: list[str]) -> Any:
    """The model of `empty`, quantized while it loads; spread over all `devices` if there are several.

    Raises Failure for a checkpoint that lacks weights.
    """
    from transformers import AutoModelForCausalLM, QuantoConfig, logging

    logging.disable_progress_bar()
    options = {"dtype": empty.dtype, "device_map": {"": devices[0]} if len(devices) == 1 else "auto"}
    if s.weights:
        use_plain_kernels()
        from optimum.quanto.tensor.weights.qbits import WeightQBitsTensor

        options["quantization_config"] = QuantoConfig(weights=s.weights)
        if s.compile and devices == ["cpu"]:  # TinyGemm's packing takes hours to undo on a CPU
            WeightQBitsTensor.create = staticmethod(WeightQBitsTensor)  # tensor/weights/qbits.py:65
    if s.random_weights:
        state = random_state(empty)
        model = type(empty).from_pretrained(None, config=empty.config, state_dict=state, **options)
    else:
        options |= {"trust_remote_code": s.trust_remote_code, "output_loading_info": True}
        model, told = AutoModelForCausalLM.from_pretrained(folder, **options)
        missing = [key for key in told["missing_keys"] if not key.endswith(ACTIVATION_SCALES)]
        if missing:
            raise Failure(f"the checkpoint lacks {len(missing)} weights ({missing[0]}): download it again")
    if {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())) - {*devices}:
        raise Failure(f"the model does not fit {', '.join(devices)}: parts were left to the CPU or the disk")
    return model.eval()


def weigh(model: Any) -> dict[str, Any]:
    """The fields of a Result about the weights: bytes, and how many layers Quanto really holds."""
    linear = [model.get_submodule(name).weight for name in linear_names(model)]
    inner = [getattr(weight, "data", weight) for weight in linear]
    quantized = [w for w in inner if hasattr(w, "__tensor_flatten__")]
    kinds = [type(w).__name__ for w in quantized]
    # not Quanto's scales of activations: scalars that no quantized weight uses
    buffers = [b for name, b in model.named_buffers() if not name.endswith(ACTIVATION_SCALES)]
    unique = {id(t): t for t in [*model.parameters(), *buffers]}.values()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": stored_bytes(unique),
        # a wrapper reports numel and dtype of the unquantized weight: here that is what is wanted
        "unquantized_bytes": sum(t.numel() * t.dtype.itemsize for t in unique),
        "quantizable_bytes": sum(w.numel() * w.dtype.itemsize for w in inner),
        "quantized_layers": len(quantized),
        "linear_layers": len(linear) + hasattr(model.get_output_embeddings(), "weight"),
        "weight_types": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }


def bytes_per_token(model: Any, kept: int) -> tuple[int, int] | None:
    """Bytes that one decode step must read: of the `kept` ones of weights (not an untied input embedding), and for each
    token in the KV cache.

    None for a mixture of experts (a step reads some of them) and where the cache's shape is unknown.
    """
    config = model.config.get_text_config()
    if any("expert" in name for name, _ in model.named_modules()):
        return None
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = config.num_hidden_layers
    except AttributeError:
        return None
    given, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is None or given.weight.data_ptr() == output.weight.data_ptr()
    return kept - (
        0 if tied else stored_bytes([given.weight])
    ), 2 * layers * heads * width * model.dtype.itemsize


def first_line(error: BaseException) -> str:
    """An exception's own words, cut to a line."""
    lines = str(error).strip().splitlines() or [""]
    return (lines[0] or type(error).__name__)[:300].rstrip(".: ")


LACKS = {  # what an error's text says -> what this machine lacks
    "No working C++ compiler": "a C++ compiler (Linux: apt install g++; Windows: Visual Studio Build Tools)",
    "Failed to find C compiler": "a C compiler (Linux: apt install gcc)",
    "Python.h": "Python's headers (apt install python3-dev)",
    "working triton": "a working Triton (pip install triton; on Windows triton-windows)",
    "No module named 'triton'": "Triton (pip install triton; on Windows triton-windows)",
}


def would_fit(empty: Any, free: float, needed: float = math.inf) -> str:
    """The precisions whose weights fit into `free` bytes and are smaller than the `needed` ones, as advice."""
    if empty is None:  # it failed before the model's size was known
        return "close other programs, or take a smaller model"
    fits = [
        f"{p} ({gib(expected_bytes(empty, p))} GiB)"
        for p in PRECISIONS
        if expected_bytes(empty, p) * 1.1 < free and expected_bytes(empty, p) < needed
    ]
    if not fits and needed * 1.1 < free:
        return f"the weights alone ({gib(needed)} GiB) would fit: ask for fewer tokens"
    return f"would fit: {', '.join(fits)}" if fits else "no precision fits: take a smaller model"


def explain(error: Exception, stage: Stage) -> tuple[str, bool]:
    """An exception in the user's words, and whether it is a lack of this machine (else it is a failure)."""
    text = str(error)
    if isinstance(error, Failure):
        return text, False
    if "trust_remote_code" in text:
        return "the model runs code of its repository: read it, then add --trust-remote-code", False
    # of CUDA and MPS, of the CPU on Linux and on Windows, of cuBLAS
    signs = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    if any(sign in text.lower() for sign in signs) or isinstance(error, MemoryError):
        where = f"{gib(stage.free)} GiB were free on {', '.join(stage.devices)}"
        advice = would_fit(stage.empty, stage.free, stage.needed)
        return f"out of memory while {stage.doing}: {where}; {advice}", False
    for sign, lack in LACKS.items():
        if sign.lower() in text.lower():
            return f"needs {lack}, which is missing here", True
    if isinstance(error, ImportError):
        return f"{first_line(error)}: pip install -r requirements.txt", False
    if stage.devices == ["mps"] and isinstance(error, (NotImplementedError, TypeError)):
        return f"not possible on MPS with this torch ({first_line(error)})", True
    return f"{type(error).__name__} while {stage.doing}: {first_line(error)} (--debug shows more)", False


def fit(s: Settings, empty: Any, devices: list[str], tell: Tell, notes: list[str]) -> list[str]:
    """The devices to load on: the first GPU that the model fits, else all. Says what is coming before it comes.

    Raises Failure for a model beyond the devices' total memory; one beyond their free memory is tried, with a note.
    """
    sizes = {p: expected_bytes(empty, p) for p in PRECISIONS}
    needed = sizes[s.weights or "none"]
    roomy = next((d for d in devices if needed * 1.1 < memory_of(d)[0]), None)
    devices = [roomy] if roomy else devices
    free, total = map(sum, zip(*map(memory_of, devices), strict=True))
    where = ", ".join(devices)
    tell(
        f"{s.model_name}, {s.weights or 'as stored'}: {digits(sum(p.numel() for p in empty.parameters()), 1e9)} B "
        f"parameters, {gib(needed)} GiB of weights expected, {gib(free)} GiB free on {where}"
    )
    if needed > total:
        advice = would_fit(empty, total)
        raise Failure(f"the weights need {gib(needed)} GiB and {where} has {gib(total)} GiB in all; {advice}")
    if needed > free:
        free_there = f"{gib(free)} GiB are free on {where}"
        notes.append(f"the weights need {gib(needed)} GiB, only {free_there}: tried all the same")
    return devices


# --------------------------------------------------------------------------------------------------- compile
# Quanto under torch.compile. The documented `model = torch.compile(model)` compiles nothing, since generate() is bound
# to the model inside (pytorch #161743), and generate()'s own compiling refuses Quanto (is_compileable in transformers'
# quantizers/base.py). What follows gives generate() a compiled decode step of its own, for every precision alike:
# - Linear layers hold Quanto's numbers as plain tensors. A wrapped weight costs Python on every call, and
#   quanto::qbytes_mm (library/qbytes_mm.py:24) is opaque: 5 bytes are moved for each weight of one.
# - Attention reads the static cache in windows: all of a long cache costs half the rate on a CPU.
# - On CUDA one graph a window is recorded and replayed: Python's part of a step is then two launches.

WINDOW = 256  # tokens


def starts_early() -> bool:
    """Whether a kernel can be launched while the one before it ends: programmatic dependent launch, from Hopper on."""
    import torch

    return torch.version.cuda is not None and torch.cuda.get_device_capability() >= (9, 0)


def launch_options() -> dict[str, Any]:
    """For a kernel that calls gdc_wait and gdc_launch_dependents where EARLY is set."""
    return {"EARLY": True, "launch_pdl": True} if starts_early() else {"EARLY": False}


@functools.cache
def gemv() -> Callable:
    """y = (weight x) * scale for one token on CUDA: x [1, columns], weight [rows, columns], scale [rows, 1], y [1, rows].

    A decode step's matrix product, which reads each stored byte once and sums in float32. In Triton, since Inductor's
    own reductions come out right only by minutes of tuning, and not every time. Also for unquantized weights.
    """
    import torch
    import triton

    global tl  # a kernel finds its names among the module's
    import triton.language as tl

    @triton.jit
    def kernel(x, weight, scale, y, rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        start = row.to(tl.int64) * cols
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        if EARLY:
            # in this order: the kernel after this one takes for granted that the one before it has ended
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        for first in tl.range(0, cols, BLOCK, num_stages=3):
            col = first + tl.arange(0, BLOCK)
            inside = (row < rows)[:, None] & (col < cols)[None, :]
            values = tl.load(weight + start[:, None] + col[None, :], inside, 0.0).to(tl.float32)
            total += values * tl.load(x + col, col < cols, 0.0).to(tl.float32)[None, :]
        factor = tl.load(scale + row, row < rows).to(tl.float32)
        tl.store(y + row, tl.sum(total, 1) * factor, row < rows)

    # of 40 forms the fastest for int8 on an H100
    form = {"ROWS": 2, "BLOCK": 1024, "num_warps": 2} | launch_options()

    def run(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(1, weight.shape[0])
        grid = (-(-weight.shape[0] // form["ROWS"]),)
        kernel[grid](x, weight, scale, y, *weight.shape, **form)
        return y

    schema = "(Tensor x, Tensor weight, Tensor scale) -> Tensor"
    op = torch.library.custom_op("qwquanto::gemv", run, mutates_args=(), schema=schema)
    op.register_fake(lambda x, weight, scale: x.new_empty(1, weight.shape[0]))
    return op


@functools.cache
def attend() -> Callable:
    """Attention of one token on CUDA: query [1, heads, 1, size], cache [1, kv heads, length, size], mask [1, 1, 1, window].

    Flash decoding (Dao and others 2023): each block of 64 places by itself, then all blocks together. Inductor's sums read
    the keys for every head anew and run along the window on few processors: 2 and 15 us slower a layer at 256 and 2048
    places on an H100.
    """
    import torch
    import triton

    global tl
    import triton.language as tl

    @triton.jit
    def blocks(
        query, key, value, mask, out, top, total, group, size, scaling, stride,
        GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        if EARLY:
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
        weights = tl.exp(scores - highest[:, None])  # 0 if unseen; `together` drops all-unseen blocks
        row = (head * count + block) * group + g
        tl.store(top + row, highest, g < group)
        tl.store(total + row, tl.sum(weights, 1), g < group)
        part = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        tl.store(out + row[:, None] * size + i[None, :], part, inside)

    @triton.jit
    def together(
        part, top, total, out, count, group, size,
        SIZE: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        if EARLY:
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

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        (_, heads, _, size), kv = query.shape, key.shape[1]
        count, group, wide = mask.shape[-1] // 64, heads // kv, triton.next_power_of_2(size)
        part = query.new_empty(kv, count, group, size, dtype=torch.float32)
        top, total = part.new_empty(kv, count, group), part.new_empty(kv, count, group)
        form = {"GROUP": max(16, triton.next_power_of_2(group)), "SIZE": wide, "BLOCK": 64}
        tensors = (query, key, value, mask, part, top, total)
        blocks[(kv, count)](*tensors, group, size, scaling, key.stride(1), **form, **launch_options())
        out = torch.empty_like(query)
        together[(heads,)](part, top, total, out, count, group, size, wide, 16, **launch_options())
        return out

    schema = "(Tensor query, Tensor key, Tensor value, Tensor mask, float scaling) -> Tensor"
    op = torch.library.custom_op("qwquanto::attend", run, mutates_args=(), schema=schema)
    op.register_fake(lambda query, key, value, mask, scaling: torch.empty_like(query))
    return op


@functools.cache
def plain_linear() -> Callable:
    """linear layer -> a layer that computes the same with plain tensors."""
    import torch

    class Plain(torch.nn.Module):
        def __init__(self, bias: Any, **tensors: Any) -> None:
            super().__init__()
            self.bias = bias
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)

        def forward(self, x: Any) -> Any:
            y = self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias

    class Rows(Plain):
        """8 bits, or as stored with a scale of one: data [rows, columns], scale [rows, 1]."""

        def __init__(self, bias: Any, data: Any, scale: Any) -> None:
            super().__init__(bias, data=data, scale=scale)
            if data.is_cuda:
                native = torch.cuda.get_device_capability(data.device) >= (8, 9)
            else:
                native = torch.backends.cpu.get_cpu_capability() == "AVX512"
            self.emulated = data.dtype == torch.float8_e4m3fn and not native
            self.gemv = gemv() if data.is_cuda and not self.emulated else None

        def product(self, x: Any) -> Any:
            data, scale = self.data, self.scale
            if self.gemv and x.shape[0] == 1:
                return self.gemv(x, data, scale)
            if x.is_cpu and (data.dtype, x.dtype) == (torch.int8, torch.bfloat16) and x.shape[1] % 4 == 0:
                return torch._weight_int8pack_mm(x, data, scale.flatten())  # as Quanto does on a CPU
            if x.shape[0] > 1 or not torch.compiler.is_compiling():
                return x @ (data if data.dtype == x.dtype else data.to(x.dtype) * scale).t()
            # a sum, not a matmul: Inductor fuses it with the reading of the bytes
            return ((x.float() * self.floats()).sum(-1) * scale.float().flatten()).to(x.dtype)[None]

        def floats(self) -> Any:
            if not self.emulated:
                return self.data.float()
            # the bits of a float16 of 1/256 of the value, in operations that every machine vectorizes
            half = self.data.view(torch.int8).to(torch.int16) * 128 & -16512
            return half.view(torch.float16).float() * 256

    class Groups(Plain):
        """4 or 2 bits, weight = q * scale + zero a group; data[row, group, i] holds its elements i, i + chunk, …"""

        def product(self, x: Any) -> Any:
            groups, chunk = self.data.shape[1:]
            parts = x.shape[1] // groups // chunk
            bits = 8 // parts
            q = [self.data >> bits * i & 2**bits - 1 for i in range(parts)]
            if x.shape[0] > 1 or not torch.compiler.is_compiling():
                weight = torch.stack(q, 2).flatten(2) * self.scale[:, :, None] + self.zero[:, :, None]
                return x @ weight.flatten(1).to(x.dtype).t()
            # scale and zero taken out of the sum over a group
            x = x.view(groups, parts, chunk).float()
            dots = sum(x[:, i] * q[i] for i in range(parts)).sum(-1)
            y = (dots * self.scale.float() + x.sum((1, 2)) * self.zero.float()).sum(-1)
            return y.to(self.scale.dtype)[None]

    class TinyGemm(Plain):
        """4 bits on CUDA in bfloat16: the kernel that Quanto uses too, but packed for fewer, larger reads."""

        def product(self, x: Any) -> Any:
            return torch._weight_int4pack_mm(x, self.data, x.shape[1] // self.scale.shape[0], self.scale)

    def plain(linear: Any) -> Any:
        weight, bias = getattr(linear.weight, "data", linear.weight), linear.bias
        if not hasattr(weight, "_qtype"):
            ones = weight.new_ones(len(weight), 1)
            return Rows(bias, data=weight, scale=ones)
        if weight._qtype.bits == 8:
            return Rows(bias, data=weight._data, scale=weight._scale)
        q = weight._data.unpack()
        if hasattr(weight, "_scale_shift"):
            data = torch._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).contiguous(), 8)
            return TinyGemm(bias, data=data, scale=weight._scale_shift)
        bits, rows = weight._qtype.bits, weight.shape[0]
        scale, shift = weight._scale.view(rows, -1), weight._shift.view(rows, -1)
        q = q.view(rows, scale.shape[1], 8 // bits, -1)
        data = sum(q[:, :, i] << bits * i for i in range(8 // bits))
        zero = -shift if shift.is_floating_point() else -shift * scale
        return Groups(bias, data=data, scale=scale, zero=zero)

    return plain


def window_attention(module, query, key, value, mask, scaling=None, **more):
    """Attention over the first mask.shape[-1] places of the cache; heads of a group share their keys uncopied.

    transformers' own sdpa copies keys and values for every head, and reads all of a static cache. Refuses the variants
    that it would get wrong.
    """
    import torch

    given = {name for name, value in more.items() if value is not None}
    if unknown := given & {"softcap", "s_aux", "sliding_window", "position_bias"}:
        raise Failure(f"--compile does not know this model's attention ({', '.join(unknown)}): leave it out")
    batch, heads, length, size = query.shape
    if length == 1 and query.is_cuda and value.shape == key.shape:  # DeepSeek's values are narrower
        out = torch.ops.qwquanto.attend(query.contiguous(), key, value, mask, scaling)
        return out.view(batch, 1, heads, size), None
    key, value = key[:, :, : mask.shape[-1]], value[:, :, : mask.shape[-1]]
    if length == 1:
        query = query.view(batch, key.shape[1], -1, size)
        # sums, not matmuls: Inductor fuses and vectorizes them, and in float32 Qwen2's large scores stay exact
        scores = (query[..., None, :].float() * key[:, :, None]).sum(-1) * scaling
        weights = torch.softmax(scores.masked_fill(~mask, -math.inf), -1)
        out = (weights[..., None] * value[:, :, None]).sum(-2).to(value.dtype)
    else:
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


def replace_parts(model: Any) -> None:
    """Give a model the linear layers and the attention above, and have its decoder layers compiled as one."""
    import torch
    from transformers import AttentionInterface

    for kind in {type(m) for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())}:
        kind.forward = torch.compiler.nested_compile_region(kind.forward)  # one layer is compiled, not 36
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # where Triton launches and graphs are recorded
        attend()  # registers it: torch.compile cannot
    # names, not modules: a layer that is replaced must not stay in memory
    for name in [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]:
        model.set_submodule(name, plain_linear()(model.get_submodule(name)))
    AttentionInterface.register("window", window_attention)
    model.config._attn_implementation = "window"


def compilable(model: Any, longest: int) -> tuple[dict[str, Any], Callable[[], None]]:
    """Prepare a model for compiled decode up to `longest` tokens, one sequence without padding; once a model.

    Returns the options that generate() then needs (its cache must be reset before every call) and a function that
    records CUDA graphs once the step has been compiled by a first run.
    """
    import torch
    from transformers import CompileConfig, StaticCache
    from transformers.cache_utils import StaticLayer

    if len({str(p.device) for p in model.parameters()}) > 1:
        raise Failure("--compile needs the model on one device: it is spread over several, leave it out")
    sizes = range(WINDOW, longest + WINDOW, WINDOW)
    # 16 more, so that the cache is never as long as a window: equal sizes would be taken for one
    cache = StaticCache(config=model.config, max_cache_len=sizes[-1] + 16)
    if not model._supports_attention_backend or {type(layer) for layer in cache.layers} != {StaticLayer}:
        raise Failure("--compile does not know this model's attention: leave --compile out")
    replace_parts(model)
    places = torch.arange(sizes[-1], device=model.device)
    windows = {size: places[:size].clone() for size in sizes}
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    graphs: dict[int, tuple[Any, Any]] = {}

    def step(window: Any) -> Any:
        position = cache.layers[0].cumulative_length.view(1, 1).clone()
        mask = (window <= position)[None, None]
        inputs = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
        return model.forward(input_ids=token, **inputs, use_cache=True)

    for window in windows.values():
        torch._dynamo.maybe_mark_dynamic(window, 0)  # one graph serves all windows
    # guards on shapes alone: nothing else changes here, and checking them all costs a CPU 1 ms a token
    options = {"guard_filter_fn": lambda guards: [guard.guard_type == "SHAPE_ENV" for guard in guards]}
    if model.device.type == "cuda":
        options["triton.enable_pdl"] = starts_early()
    compiled = torch.compile(step, fullgraph=True, dynamic=False, options=options)

    def decode(input_ids: Any, **_: Any) -> Any:
        size = -(-input_ids.shape[1] // WINDOW) * WINDOW
        token.copy_(input_ids[:, -1:])
        if size not in graphs:
            return compiled(windows[size])
        graph, output = graphs[size]
        graph.replay()
        return output

    @torch.no_grad()
    def record() -> None:
        pool = torch.cuda.graph_pool_handle()
        for size, window in windows.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                output = compiled(window)
            graphs[size] = graph, output

    prepare = model.prepare_inputs_for_generation

    def inputs(input_ids: Any, is_first_iteration: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The step needs the ids alone; transformers prepares the rest op by op, 0.5 ms a token (generation/utils.py:660)."""
        if is_first_iteration:
            return prepare(input_ids, is_first_iteration=True, **kwargs)
        return {"input_ids": input_ids}

    def prompt_mask(inputs_embeds: Any, **_: Any) -> Any:
        length = inputs_embeds.shape[1]
        return (places[: -(-length // WINDOW) * WINDOW] <= places[:length, None])[None, None]

    model.prepare_inputs_for_generation = inputs
    model.create_masks_for_generate = prompt_mask
    model.get_compiled_call = lambda config: decode
    model.hf_quantizer = None  # its is_compileable is False for Quanto: transformers quantizers/base.py
    config = CompileConfig()
    # the CPU too: transformers generation/utils.py, _valid_auto_compile_criteria
    config._compile_all_devices = True
    return {"past_key_values": cache, "compile_config": config}, record


def graphs_compiled() -> int:
    """Graphs that Dynamo has captured in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def compile_decode(s: Settings, rig: Rig, tell: Tell) -> Compiled:
    """Compile the decode step by running it, and record it for all windows. Raises Failure if nothing was compiled."""
    begin, tokens = time.perf_counter(), rig.prompt.shape[1]
    judged = min(s.quality_tokens, rig.room) if s.compare else 0
    longest = max(tokens + rig.new_tokens, tokens + judged, PREFILL_TOKENS)
    tell(f"compiling the decode step for up to {longest} tokens: this takes a minute or so")
    options, record = compilable(rig.model, longest)
    rig.compile_options.update(options)
    two_or_more = replace(rig, exact=True, new_tokens=max(2, rig.new_tokens))  # a first token needs no step
    run_once(s, two_or_more, s.seed, tell, "compiling", warm_up=True)
    if graphs_compiled() == 0:
        raise Failure("torch.compile compiled nothing: these figures would be eager; leave --compile out")
    if rig.model.device.type == "cuda":
        tell("recording CUDA graphs", live=True)
        record()
    return Compiled(time.perf_counter() - begin, graphs_compiled())


def mean_window(prompt_tokens: int, generated_tokens: int) -> float:
    """Tokens of the static cache that a decode step reads, on average."""
    steps = range(1, max(2, generated_tokens))
    return statistics.fmean(-(-(prompt_tokens + i) // WINDOW) * WINDOW for i in steps)


# --------------------------------------------------------------------------------------------------- measure


@dataclass
class Clock:
    """A stopping criterion that takes the time of every token: generate() asks it after sampling, once a token.

    On CUDA it records an event: waiting for the device would keep the host from launching the rest of the step (that and
    a heavier `peak_memory` cost a compiled token on an H100 4.6 %). Elsewhere it reads the host's clock. On MPS generate()
    checks for the end one step late (transformers generation/utils.py, DeferredStopCheck), and waiting would undo that:
    there only the first token is stamped.
    """

    devices: list[str]
    limit_s: float
    least_tokens: int  # before the time limit counts
    each_token: Callable[[int, float], None] = lambda tokens, seconds: None  # tokens so far, seconds so far
    stream: Any = None
    begin: float = 0.0
    marks: list[Any] = field(default_factory=list)  # of the start and of each token: seconds or events
    stamps: list[float] = field(default_factory=list)  # of each token, in seconds from the start
    latency_s: float = 0.0

    def mark(self) -> None:
        import torch

        if self.stream:
            self.marks.append(self.stream.record_event(torch.cuda.Event(enable_timing=True)))
            return
        if self.devices == ["mps"] and len(self.marks) == 1:
            torch.mps.synchronize()
        self.marks.append(time.perf_counter())

    def start(self, device: Any) -> None:
        """Begin, with everything done; `device` is where tokens are sampled."""
        import torch

        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        synchronizer(self.devices)()
        self.begin = time.perf_counter()
        self.mark()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> bool:
        self.mark()
        tokens, seconds = len(self.marks) - 1, time.perf_counter() - self.begin
        self.each_token(tokens, seconds)
        return seconds >= self.limit_s and tokens >= self.least_tokens

    def stop(self) -> None:
        """End, when everything is done."""
        synchronizer(self.devices)()
        self.latency_s = time.perf_counter() - self.begin
        first, *tokens = self.marks
        since = lambda mark: first.elapsed_time(mark) / 1000 if self.stream else mark - first
        self.stamps = [since(mark) for mark in tokens]


@dataclass(frozen=True)
class Rig:
    """What a timed generation needs besides its settings."""

    model: Any
    tokenizer: Any
    prompt: Any  # token ids, shape [1, prompt tokens]
    new_tokens: int  # at most; exactly, if `exact`
    room: int  # positions the model has left after the prompt
    exact: bool
    devices: list[str]
    handles: dict[str, Any]
    reads: tuple[int, int] | None = None  # see `bytes_per_token`
    compile_options: dict[str, Any] = field(default_factory=dict)  # filled by `compile_decode`


def options_for(s: Settings, rig: Rig) -> dict[str, Any]:
    """generate()'s options. max_new_tokens, since Qwen2.5's generation_config.json makes it ignore max_length."""
    # one sequence is never padded; None would be warned of
    options = {"max_new_tokens": rig.new_tokens, "do_sample": s.do_sample, "pad_token_id": 0}
    if s.do_sample:
        options["temperature"] = s.temperature
    if rig.exact:
        # ignored, not forbidden: min_new_tokens costs kernels for every token
        options["eos_token_id"] = None
    return options


def generate(rig: Rig, prompt: Any, clock: Clock, **options: Any) -> Any:
    """The token ids, shape [1, prompt + new], of one timed call of model.generate()."""
    import torch

    if rig.compile_options:
        rig.compile_options["past_key_values"].reset()
    options |= {"attention_mask": torch.ones_like(prompt), "stopping_criteria": [clock]}
    clock.start(prompt.device)
    ids = rig.model.generate(prompt, **options, **rig.compile_options)
    clock.stop()
    return ids


def run_once(s: Settings, rig: Rig, seed: int, tell: Tell, title: str, warm_up: bool = False) -> Run:
    """One timed generation of the question; a warm-up ends early, after WARMUP_TOKENS and WARMUP_S."""
    import torch

    told = [0.0]

    def progress(tokens: int, seconds: float) -> None:
        if seconds - told[0] > 0.2:
            told[0] = seconds
            tell(f"{title}: {tokens} tokens, {tokens / seconds:.1f} tokens/s", live=True)

    limits = (WARMUP_S, WARMUP_TOKENS) if warm_up else (s.max_seconds, 0)
    clock = Clock(rig.devices, *limits, progress)
    options = options_for(s, rig)
    torch.manual_seed(seed)
    energy = energy_j(rig.handles)
    ids = generate(rig, rig.prompt, clock, **options)
    latency, ttft = clock.latency_s, clock.stamps[0]
    spent = {d: now - energy[d] for d, now in energy_j(rig.handles).items() if d in energy}
    new = ids[0, rig.prompt.shape[1] :].tolist()
    mps = rig.devices == ["mps"]
    decode_s = latency - ttft if mps else clock.stamps[-1] - ttft
    ends = rig.model.generation_config.eos_token_id
    ended = not rig.exact and new[-1] in (ends if isinstance(ends, list) else [ends])
    return Run(
        seed=seed,
        prompt_tokens=rig.prompt.shape[1],
        generated_tokens=len(new),
        stop_reason="eos" if ended else "length" if len(new) == rig.new_tokens else "time",
        latency_s=latency,
        ttft_s=ttft,
        decode_tokens_per_s=(len(new) - 1) / decode_s if len(new) > 1 else None,
        tokens_per_s=len(new) / latency,
        inter_token_s=[] if mps else [b - a for a, b in zip(clock.stamps, clock.stamps[1:], strict=False)],
        # the counter moves every 20 to 100 ms: a short run's difference means nothing
        energy_j=spent if latency >= 1 and spent else None,
        text=rig.tokenizer.decode(new, skip_special_tokens=True) if rig.tokenizer else "",
    )


def prefill_rate(s: Settings, rig: Rig, tell: Tell) -> tuple[int, float]:
    """Prompt tokens and tokens a second of prefill: random ids, median of three after one that is not counted.

    On a slow machine the first is as good as any other and is the only one; where even that would take more than
    MAX_SECONDS, judged by the prefill of 32 tokens, the prompt is shorter.
    """
    import torch

    config = rig.model.config.get_text_config()
    tokens = min(PREFILL_TOKENS, getattr(config, "max_position_embeddings", PREFILL_TOKENS) - 1)
    ids = torch.randint(10, config.vocab_size - 10, (1, tokens)).to(rig.prompt.device)

    def once(length: int) -> float:
        tell(f"prefill of {length} tokens", live=True)
        clock = Clock(rig.devices, math.inf, 0)
        generate(rig, ids[:, :length], clock, max_new_tokens=1, do_sample=False, pad_token_id=0)
        return clock.stamps[0]

    small = once(min(32, tokens))
    while tokens > 64 and small / 32 * tokens > s.max_seconds:
        tokens //= 2
    first = once(tokens)
    return tokens, tokens / (first if first > 5 else statistics.median(once(tokens) for _ in range(3)))


def prompt_ids(s: Settings, folder: str | None, model: Any) -> tuple[Any, Any]:
    """The tokenizer (None with random weights) and the question's token ids, shape [1, tokens]. Raises Failure."""
    import torch
    from transformers import AutoTokenizer

    device = model.get_input_embeddings().weight.device
    if s.random_weights:
        torch.manual_seed(s.seed)
        return None, torch.randint(10, model.config.get_text_config().vocab_size - 10, (1, 16)).to(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=s.trust_remote_code)
    except Exception as error:
        raise Failure(f"{s.model_name} has no usable tokenizer: {first_line(error)}") from error
    if s.chat and not getattr(tokenizer, "chat_template", None):
        raise Failure(f"{s.model_name} has no chat template: it is no chat model; leave --chat out")
    if s.chat:
        messages = [{"role": "user", "content": s.question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    else:
        ids = tokenizer(s.question, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise Failure("the tokenizer makes no token of the question: ask another QUESTION")
    return tokenizer, ids.to(device)


def room_after(s: Settings, model: Any, prompt_tokens: int) -> int:
    """Positions that the model has left after the prompt. Raises Failure where there is none for an answer."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20
    if prompt_tokens >= min(longest, longest if s.compare else s.max_length):
        limit = f"MAX_LENGTH {s.max_length} or the model"
        raise Failure(f"the question has {prompt_tokens} tokens: {limit} leaves no room")
    return longest - prompt_tokens


def really_used(s: Settings, rig: Rig) -> dict[str, Any]:
    """The sampling settings that generate() ends up with, its hidden defaults (top_k = 50) included."""
    sampling = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    names = (*sampling, "max_new_tokens", "eos_token_id")
    prepared, _ = rig.model._prepare_generation_config(None, **options_for(s, rig))
    return {name: getattr(prepared, name, None) for name in names}


@dataclass
class Stage:
    """Where a measurement stands, for the message if it fails there."""

    doing: str = "starting"
    empty: Any = None
    devices: list[str] = field(default_factory=lambda: ["cpu"])
    free: float = 0.0  # bytes before loading
    needed: float = math.inf  # bytes of the weights


def measure(
    s: Settings, tell: Tell, save: Callable[[Result], None], reference: str | None = None, debug: bool = False
) -> Result:
    """Load, measure and return one configuration; `save` gets the Result whenever it has grown, so nothing is lost.

    `reference` is a folder in which the unquantized model leaves its answer, and the quantized ones find it.
    Prints nothing. A failure is a field of the Result; only KeyboardInterrupt comes through.
    """
    result, stage = Result(s), Stage()

    def grow(**fields: Any) -> Result:
        nonlocal result
        result = replace(result, **fields)
        save(result)
        return result

    try:
        rig = set_up(s, stage, tell, grow)
        time_runs(s, rig, stage, tell, grow)
        stage.doing = "measuring prefill"
        tokens, rate = prefill_rate(s, rig, tell)
        grow(prefill_tokens=tokens, prefill_tokens_per_s=rate)
        if reference and s.quality_tokens and not s.random_weights:
            stage.doing = "measuring quality"
            grow(quality=judge(s, rig, Path(reference), tell))
    except Exception as error:  # noqa: BLE001 (whatever it is becomes the Result's failure)
        if debug:
            traceback.print_exc()
        text, unavailable = explain(error, stage)
        grow(failure=text, unavailable=unavailable)
    return result


def set_up(s: Settings, stage: Stage, tell: Tell, grow: Callable[..., Result]) -> Rig:
    """Choose the device, load the model and ready it for its runs; memory and weights go into the Result."""
    import torch

    stage.doing = "looking for a device"
    stage.devices, notes = choose_devices(s.device)
    notes += busy_note()
    grow(devices=stage.devices, notes=notes)
    for note in notes:
        tell(note)
    stage.doing = "getting the model"
    folder = fetch(s)
    if folder and not s.random_weights:
        check_checkpoint(folder)
    stage.doing = "reading the model's configuration"
    stage.empty = skeleton(s, folder)
    stage.needed = expected_bytes(stage.empty, s.weights or "none")
    stage.devices = devices = fit(s, stage.empty, stage.devices, tell, notes)
    stage.free = sum(memory_of(device)[0] for device in devices)
    handles, reasons = nvml_handles(devices)
    grow(environment=environment(devices, handles), devices=devices, notes=notes + reasons)
    stage.doing = "measuring the memory's bandwidth"
    tell(stage.doing, live=True)
    speeds = {device: memory_bandwidth(device) for device in devices}
    (torch.mps if devices == ["mps"] else torch.cuda).empty_cache()  # the latter: nothing without CUDA
    before = snapshot(devices, handles)
    grow(memory_bytes_per_s=speeds, memory={"before load": before})
    stage.doing = "loading the model"
    tell(stage.doing, live=True)
    if s.weights:
        use_plain_kernels()  # importing Quanto is not loading
    begin = time.perf_counter()
    with peak_memory(devices, handles) as peak:
        model = load(s, folder, stage.empty, devices)
        synchronizer(devices)()
        load_s = time.perf_counter() - begin
        memory = {"before load": before, "after load": snapshot(devices, handles), "peak of load": peak()}
    result = grow(load_s=load_s, memory=memory, **weigh(model))
    stage.doing = "running the model"
    tokenizer, prompt = prompt_ids(s, folder, model)
    room = room_after(s, model, prompt.shape[1])
    wanted = s.compare_tokens if s.compare else s.max_length - prompt.shape[1]
    reads = bytes_per_token(model, result.weight_bytes)
    rig = Rig(model, tokenizer, prompt, min(wanted, room), room, bool(s.compare), devices, handles, reads)
    grow(generation=really_used(s, rig))
    return rig


def warmup_runs(s: Settings, rig: Rig, tell: Tell, title: str) -> list[Run]:
    """WARMUP_RUNS untimed runs, and more until WARMUP_S have passed: a GPU machine needs seconds to reach its pace."""
    begin, runs = time.perf_counter(), []
    while len(runs) < s.warmup_runs or (runs and time.perf_counter() - begin < WARMUP_S):
        runs.append(run_once(s, rig, s.seed + len(runs), tell, title, warm_up=True))
    return runs


def time_runs(s: Settings, rig: Rig, stage: Stage, tell: Tell, grow: Callable[..., Result]) -> None:
    """Warm-up and timed runs, eager before compiled in a comparison; a compiled `rig` is changed to that."""
    if s.compile and s.compare:
        warmup_runs(s, rig, tell, "eager warm-up")
        eager = []
        for i in range(s.runs):
            eager.append(run_once(s, rig, s.seed + i, tell, f"eager run {i + 1} of {s.runs}"))
            grow(eager_runs=eager.copy())
    compiled = None
    if s.compile:
        stage.doing = "compiling the decode step"
        compiled = compile_decode(s, rig, tell)
        grow(compiled=compiled)
        stage.doing = "running the compiled model"
    warm = warmup_runs(s, rig, tell, "warm-up")
    result, graphs, runs = grow(warmup=warm), compiled and graphs_compiled(), []
    rate = decode_rate(warm)
    each = min(s.max_seconds, rig.new_tokens / rate) if rate else s.max_seconds
    longest = minutes(s.runs * each)
    tell(f"{counted(s.runs, 'run')} of at most {rig.new_tokens} tokens: up to {longest}, then prefill")
    with peak_memory(rig.devices, rig.handles) as peak:
        for i in range(s.runs):
            runs.append(run_once(s, rig, s.seed + i, tell, f"run {i + 1} of {s.runs}"))
            result = grow(runs=runs.copy(), memory=result.memory | {"peak of runs": peak()})
            result = grow(**utilization(result, rig))
    if compiled:
        grow(compiled=replace(compiled, recompilations=graphs_compiled() - graphs))


# --------------------------------------------------------------------------------------------------- quality


def judge(s: Settings, rig: Rig, folder: Path, tell: Tell) -> Quality | None:
    """The unquantized model leaves its greedy answer in `folder` (None); a quantized one is judged on it.

    On the path that is timed: the reference's tokens are forced one by one through generate()'s own decode step by a
    logits processor that sees the logits first. Each position is log-softmaxed in float32 as it comes and the
    reference's rows stay on disk, so a large vocabulary costs little memory.
    """
    import numpy as np
    import torch

    start, vocabulary = rig.prompt.shape[1], rig.model.config.get_text_config().vocab_size
    tokens_file, rows_file = folder / "tokens.npy", folder / "logprobs.npy"
    kl, same = [], []

    def logprobs(scores: Any) -> Any:
        # a broken model's NaN must not pass unseen, and its infinities must not make another
        return torch.log_softmax(scores[0].float().nan_to_num(0, 1e4, -1e4), -1)

    def keep(ids: Any, scores: Any) -> Any:
        rows[ids.shape[1] - start] = logprobs(scores).cpu().numpy()
        return scores

    def force(ids: Any, scores: Any) -> Any:
        position = ids.shape[1] - start
        p, q = torch.tensor(rows[position], device=scores.device), logprobs(scores)
        kl.append((p.exp() * (p - q)).sum().item())
        same.append((p.argmax() == q.argmax()).item())
        forced = torch.full_like(scores, -math.inf)
        forced[0, int(tokens[position])] = 0
        return forced

    if s.weights is None:
        room = min(s.quality_tokens, rig.room)
        rows, tokens = np.lib.format.open_memmap(rows_file, "w+", np.float32, (room, vocabulary)), range(room)
    elif not tokens_file.exists():
        return None
    else:
        rows, tokens = np.load(rows_file, mmap_mode="r"), np.load(tokens_file)
    told = "the reference answer" if s.weights is None else "quality on the reference answer"
    each = lambda n, _: tell(f"{told}: {n} of {len(tokens)} tokens", live=True) if n % 8 == 0 else None
    # a slow machine gets a shorter reference, the same for all
    clock = Clock(rig.devices, math.inf if s.weights else s.max_seconds, 1, each)
    options = options_for(replace(s, do_sample=False), replace(rig, exact=False))
    options |= {"max_new_tokens": len(tokens), "repetition_penalty": 1.0}
    ids = generate(rig, rig.prompt, clock, logits_processor=[force if s.weights else keep], **options)
    if s.weights is None:
        rows.flush()
        np.save(tokens_file, ids[0, start:].cpu().numpy())
        return None
    low, high = wilson(sum(same), len(same))
    return Quality(len(kl), statistics.fmean(kl), statistics.fmean(same), low, high)


# ------------------------------------------------------------------------------------------------ statistics


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): sensible near 0 and 1 and for few trials, unlike +-1.96 s."""
    z, share = 1.96, successes / trials
    middle, scale = share + z * z / (2 * trials), 1 + z * z / trials
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def percentile(values: list[float], percent: int) -> float | None:
    """Linear interpolation between the sorted values; None without values."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def middle(values: Iterable[float | None]) -> float | None:
    """The median of what is known."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def decode_rate(runs: list[Run]) -> float | None:
    """Median decode tokens/s of some runs."""
    return middle(r.decode_tokens_per_s for r in runs)


def common_rates(runs: list[Run]) -> list[float]:
    """Each run's decode tokens/s over the positions that all reached: sampled answers differ in length, and decode
    slows as the context grows, so only this compares run with run."""
    gaps = [r.inter_token_s for r in runs]
    shared = min(map(len, gaps), default=0)
    return [shared / sum(g[:shared]) for g in gaps] if shared else []


def relative_deviation(runs: list[Run]) -> float | None:
    """Sample standard deviation of `common_rates` over their mean."""
    rates = common_rates(runs)
    return statistics.stdev(rates) / statistics.fmean(rates) if len(rates) > 1 else None


def utilization(r: Result, rig: Rig) -> dict[str, Any]:
    """The Result's fields bytes_per_token and bandwidth_utilization (MBU).

    Over several GPUs, which work one after the other, the time that memory needs is the sum of each one's.
    """
    cached = rig.prompt.shape[1] + statistics.fmean(run.generated_tokens for run in r.runs) / 2
    # CUDA's kernel reads no place that is still empty
    if rig.compile_options and rig.prompt.device.type != "cuda":
        cached = mean_window(rig.prompt.shape[1], max(run.generated_tokens for run in r.runs))
    if rig.reads is None:
        return {}
    step, rate = int(rig.reads[0] + rig.reads[1] * cached), decode_rate(r.runs)
    if rate is None:
        return {"bytes_per_token": step}
    speeds, held = r.memory_bytes_per_s, {}
    for device in speeds:
        here = [p for p in rig.model.parameters() if device in (str(p.device), p.device.type)]
        held[device] = stored_bytes(here)
    seconds = sum(step * held[d] / sum(held.values()) / speeds[d] for d in speeds)
    return {"bytes_per_token": step, "bandwidth_utilization": seconds * rate}


def wide(r: Result) -> bool:
    """Whether the unquantized model has 32 bits a parameter."""
    return bool(r.parameters and r.unquantized_bytes > 3 * r.parameters)


def warnings_for(r: Result) -> list[str]:
    """What a reader must know before trusting the numbers, the worst first."""
    told = []
    if r.settings.random_weights:
        told.append("Random weights: speed and memory hold, text and quality mean nothing.")
    if r.settings.weights and wide(r):
        told.append(
            "32-bit weights: Quanto's promises are made against 16 bit (--dtype bfloat16 or float16)."
        )
    if r.settings.weights and r.quantized_layers == 0:
        told.append(f"NOTHING WAS QUANTIZED: Quanto knows none of its layers; {r.name} is it as stored.")
    elif r.settings.weights and r.quantizable_bytes and r.quantizable_bytes < r.unquantized_bytes / 2:
        share = percent(r.quantizable_bytes / r.unquantized_bytes)
        told.append(f"{r.name}: Quanto reaches only {share} % of the weights; the others stay as stored.")
    if verdict(r) == "broken":
        told.append(f"{r.name} BREAKS THIS MODEL (KL {digits(r.quality.kl_divergence)} nats): do not use it.")
    if r.quality and r.quality.positions < 32:
        told.append(
            f"{r.name}: quality rests on {r.quality.positions} tokens only: a short answer, or MAX_SECONDS."
        )
    if r.runs and all((run.stop_reason, run.generated_tokens) == ("eos", 1) for run in r.runs):
        told.append(f"{r.name}: every answer ended at its first token: a chat model wants --chat.")
    for kind, runs in (("eager ", r.eager_runs), ("", r.runs)):
        rates, deviation = common_rates(runs), relative_deviation(runs)
        if r.settings.compare and any(run.stop_reason == "time" for run in runs):
            told.append(
                f"{r.name}: {kind}runs ended by MAX_SECONDS, so this is less work than the others did."
            )
        if deviation is not None and deviation > UNSTABLE:
            told.append(
                f"{r.name}: the {kind}runs' rates differ by {percent(deviation)} % (s.d.): is the machine busy?"
            )
        # never of three runs, whose extremes are at most 2 s.d. apart
        if deviation and rates[0] - rates[-1] > max(2 * deviation, UNSTABLE) * statistics.fmean(rates):
            told.append(
                f"{r.name}: the last {kind}run is far slower than the first (over 2 s.d.): heat? another program?"
            )
    if r.compiled and r.compiled.recompilations:
        told.append(f"{r.name}: {r.compiled.recompilations} recompilations within timed runs count here.")
    return told + r.notes


def unlike(results: list[Result]) -> list[str]:
    """Where the precisions were not measured alike, so that their figures are hard to compare.

    A process may get faster or slower memory than another: on a shared virtual machine 33 to 61 GB/s, steady in each.
    """
    told, lengths = [], {r.name: r.prefill_tokens for r in results if r.prefill_tokens}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{name} {tokens}" for name, tokens in lengths.items())
        told.append(
            f"Prefill was measured on prompts of different length ({each} tokens): do not compare it."
        )
    for device in dict.fromkeys(device for r in results for device in r.memory_bytes_per_s):
        speeds = [r.memory_bytes_per_s[device] for r in results if device in r.memory_bytes_per_s]
        if max(speeds) > 1.1 * min(speeds):
            span = f"{digits(min(speeds), 1e9)} to {digits(max(speeds), 1e9)} GB/s"
            told.append(f"Memory of {device}: {span} measured beside different precisions; MBU is rough.")
    return told


# ---------------------------------------------------------------------------------------------------- report
# Pure: Results in; lines of rich markup and tables out.


def digits(value: float | None, scale: float = 1) -> str:
    """Three significant digits; a dash for the unknown."""
    if value is None:
        return "–"
    value /= scale
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".") if value else "0"


def counted(number: int, noun: str) -> str:
    """ "1 run", "5 runs"."""
    return f"{number} {noun}" + "s" * (number != 1)


def gib(value: float | None) -> str:
    return digits(value, 2**30)


def percent(value: float | None) -> str:
    return digits(value, 0.01)


def milliseconds(value: float | None) -> str:
    return digits(value, 0.001)


def literal(text: str) -> str:
    """Text that rich prints as it is."""
    from rich.markup import escape

    return escape(text)


def saving(r: Result) -> float | None:
    """Share of the unquantized bytes that this precision saves."""
    return 1 - r.weight_bytes / r.unquantized_bytes if r.weight_bytes and r.unquantized_bytes else None


def peak_bytes(r: Result) -> int | None:
    """Peak of the runs: tensors on all devices; where torch keeps no count (CPU), the process's RSS."""
    peak = r.memory.get("peak of runs", {})
    return sum(n for name, n in peak.items() if name.endswith("allocated")) or peak.get("rss")


def joules(run: Run) -> float | None:
    """Energy of a run over all devices."""
    return sum(run.energy_j.values()) if run.energy_j else None


def joules_a_token(run: Run) -> float | None:
    return joules(run) / run.generated_tokens if joules(run) else None


def table(title: str, columns: Iterable[str], rows: list[list[str]], left: int = 1) -> list[Any]:
    """A title and a table with Markdown borders; the first `left` columns are text, the others numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.MARKDOWN, header_style="none")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return [f"[bold]### {title}[/]", made]


def bar(value: float | None, largest: float, style: str, width: int) -> str:
    """A figure behind a bar of its size."""
    cells = 0 if not value or not largest else max(1, round(width * value / largest))
    return f"[{style}]{'█' * cells}[/]{' ' * (width - cells)} {digits(value):>5}"


def heading(r: Result, alerts: list[str]) -> list[str]:
    """Model, form, hardware and versions; then what must not be overlooked."""
    s, e = r.settings, r.environment
    form = "comparison" if s.compare else r.name
    size = f", {digits(r.parameters, 1e9)} B parameters" if r.parameters else ""
    hardware = [text for key, text in e.items() if key in ("cpu", "ram") or key in r.devices]
    versions = [
        f"{key} {text}" for key, text in e.items() if key not in ("cpu", "ram") and key not in r.devices
    ]
    compiled = ", compiled" if s.compile else ""
    title = f"[bold]# {literal(s.model_name)}: {form}{compiled}[/]{size}, on {', '.join(r.devices)}"
    return [title, "; ".join(hardware), ", ".join(versions), *([""] if alerts else []), *alerts, ""]


def single_report(r: Result) -> list[Any]:
    """The report of one configuration."""
    alerts = [f"[bold red]FAILED: {literal(r.failure)}[/]"] if r.failure else []
    alerts += [f"[bold yellow]! {literal(text)}[/]" for text in warnings_for(r)]
    parts = heading(r, alerts)
    parts += [*speed_table(r), *runs_table(r)] if r.runs else []
    parts += memory_table(r) if r.memory else []
    parts += weight_lines(r)
    if r.runs and r.runs[0].text:
        answer = " ".join(r.runs[0].text.split())[:400].rstrip("\ufffd")  # half a character, cut by the end
        parts += ["", "[bold]### The first answer begins[/]", "", f"> {literal(answer)}"]
    return parts


def speed_table(r: Result) -> list[Any]:
    """Median and extremes of the timed runs."""
    measures = {
        "decode tokens/s": [run.decode_tokens_per_s for run in r.runs],
        "TTFT ms": [run.ttft_s * 1000 for run in r.runs],
        "latency s": [run.latency_s for run in r.runs],
        "tokens/s of the whole call": [run.tokens_per_s for run in r.runs],
        "joules a token": [joules_a_token(run) for run in r.runs],
    }
    known = {name: [v for v in values if v is not None] for name, values in measures.items()}
    rows = [[name, digits(middle(v)), digits(min(v)), digits(max(v))] for name, v in known.items() if v]
    gaps = [gap for run in r.runs for gap in run.inter_token_s]
    single = {f"inter-token ms p{p}": milliseconds(percentile(gaps, p)) for p in (50, 90, 99)} if gaps else {}
    single |= {
        "s.d. of the decode rate %": percent(relative_deviation(r.runs)),
        f"prefill tokens/s ({r.prefill_tokens or PREFILL_TOKENS} tokens)": digits(r.prefill_tokens_per_s),
        "memory bandwidth measured GB/s": digits(min(r.memory_bytes_per_s.values(), default=None), 1e9),
        "share of it that decode uses % (MBU)": percent(r.bandwidth_utilization),
    }
    rows += [[name, value, "", ""] for name, value in single.items()]
    title = f"Speed: {counted(len(r.runs), 'timed run')}, {r.runs[0].prompt_tokens} prompt tokens"
    if r.compiled:
        title += f"; decode compiled in {digits(r.compiled.seconds)} s: {counted(r.compiled.graphs, 'graph')}"
        title += f", {counted(r.compiled.recompilations, 'recompilation')}"
    return table(title, ("", "median", "min", "max"), rows)


def runs_table(r: Result) -> list[Any]:
    """A line a run."""
    columns = ("run", "ended by", "tokens", "TTFT ms", "decode tok/s", "latency s", "J")
    rows = []
    times = f" x{len(r.warmup)}" if len(r.warmup) > 1 else ""
    warm = [(f"warm{times}", w) for w in r.warmup[-1:]]
    for name, run in warm + [(str(i + 1), run) for i, run in enumerate(r.runs)]:
        ended = "–" if name.startswith("warm") else run.stop_reason
        rest = digits(run.decode_tokens_per_s), digits(run.latency_s), digits(joules(run))
        rows.append([name, ended, str(run.generated_tokens), milliseconds(run.ttft_s), *rest])
    used = ", ".join(f"{key} {value}" for key, value in r.generation.items() if value is not None)
    return table(f"Runs ({used})", columns, rows, left=2)


def memory_table(r: Result) -> list[Any]:
    """Every phase of memory, a row each kind."""
    phases = ("before load", "after load", "peak of load", "peak of runs")
    names = {
        name: name.replace("used", "used by all").replace("rss", "process RSS")
        for name in r.memory[phases[0]]
    }
    rows = [[told, *(gib(r.memory.get(p, {}).get(name)) for p in phases)] for name, told in names.items()]
    return table("Memory", ("GiB", *phases), rows)


def weight_lines(r: Result) -> list[str]:
    """The weights in two sentences."""
    if r.weight_bytes is None:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in r.weight_types.items())
    return [
        (
            f"[bold]Weights: {r.weight_bytes / 1e6:,.2f} MB stored[/] ({gib(r.weight_bytes)} GiB); unquantized "
            f"{r.unquantized_bytes / 1e6:,.2f} MB: {percent(saving(r))} % saved. Loaded in {digits(r.load_s)} s."
        ),
        f"Quantized: {r.quantized_layers} of {r.linear_layers} linear layers{f' ({kinds})' if kinds else ''}.",
    ]


def verdict(r: Result) -> str:
    """What became of the answers: kept, changed, broken, or – where that was not measured."""
    if r.quality is None:
        return "–"
    kl = r.quality.kl_divergence
    return "kept" if kl < KEEPS else "changed" if kl <= BREAKS else "broken"


def comparison_report(results: list[Result]) -> list[Any]:
    """Tables, promises and verdict of several precisions of one model."""
    alerts = []
    for r in results:
        if r.failure:
            what = "unavailable" if r.unavailable else "FAILED"
            alerts.append(f"[bold red]{r.name} {what}: {literal(r.failure)}[/]")
    common = set.intersection(*(set(r.notes) for r in results))
    named = lambda r, text: f"{r.name}: {text}" if text in r.notes and text not in common else text
    warned = dict.fromkeys([named(r, text) for r in results for text in warnings_for(r)] + unlike(results))
    alerts += [f"[bold yellow]! {literal(text)}[/]" for text in warned]
    parts = heading(next((r for r in results if r.environment), results[0]), alerts)
    parts += [*comparison_speed(results), *comparison_memory(results), *promises_table(results)]
    return [*parts, *promise_reasons(results), *verdict_lines(results)]


def label(r: Result) -> str:
    """A row's name, marked if it failed."""
    return f"{r.name} [red]✗[/]" if r.failure else r.name


def comparison_speed(results: list[Result]) -> list[Any]:
    """The comparison's first table."""
    s, rates = results[0].settings, {r.name: decode_rate(r.runs) for r in results}
    largest, base, rows = max((v for v in rates.values() if v), default=0), rates.get("none"), []
    for r in results:
        rate, ttft = rates[r.name], middle(run.ttft_s for run in r.runs)
        drawn = bar(rate, largest, "green" if rate == largest else "cyan", 6)
        ratio = digits(rate / base) if rate and base else "–"
        energy = middle(joules_a_token(run) for run in r.runs)
        rest = (
            digits(r.prefill_tokens_per_s),
            milliseconds(ttft),
            percent(r.bandwidth_utilization),
            digits(energy),
        )
        rows.append([label(r), drawn, ratio, *rest])
    columns = ("weights", "decode tok/s", "x none", "prefill tok/s", "TTFT ms", "MBU %", "J/tok")
    tokens = next((r.generation["max_new_tokens"] for r in results if r.generation), s.compare_tokens)
    return table(f"Speed: medians of {counted(s.runs, 'run')} of {tokens} new tokens", columns, rows)


def comparison_memory(results: list[Result]) -> list[Any]:
    """The comparison's second table."""
    colours = {"kept": "green", "changed": "yellow", "broken": "bold red", "reference": "dim", "–": "dim"}
    largest, rows = max((r.weight_bytes or 0 for r in results), default=0) / 2**30, []
    for r in results:
        q, said = r.quality, verdict(r)
        said = "reference" if r.name == "none" and any(o.quality for o in results) else said
        share = f"{q.same_top_token * 100:.0f} ({q.low * 100:.0f}–{q.high * 100:.0f})" if q else "–"
        drawn = bar(r.weight_bytes and r.weight_bytes / 2**30, largest, "cyan", 3)
        rest = percent(saving(r)), gib(peak_bytes(r)), digits(q and q.kl_divergence), share
        rows.append([label(r), drawn, *rest, f"[{colours[said]}]{said}[/]"])
    peak = "RSS" if results[0].devices == ["cpu"] else "tensors"
    columns = ("weights", "stored", "saved %", "peak", "KL nats", "same top %", "answers")
    return table(f"Memory in GiB (peak: {peak}) and quality (same top token: 95 % interval)", columns, rows)


def promises(results: list[Result]) -> dict[str, dict[str, tuple[bool, str] | None]]:
    """Promise of Quanto's documentation -> precision -> kept, and the figure; None where it was not measured."""
    base = decode_rate(next((r.runs for r in results if r.name == "none"), []))
    told: dict[str, dict[str, tuple[bool, str] | None]] = {promise: {} for promise in PROMISED}
    for r in results:
        if r.name == "none":
            continue
        rate, saved, eager = decode_rate(r.runs), saving(r), decode_rate(r.eager_runs)
        if wide(r):  # the promises are made against 16 bit
            saved = base = None
        found = (
            (saved >= 0.5, f"{percent(saved)} %") if saved is not None else None,
            (rate >= 0.9 * base, f"{percent(rate / base)} %") if rate and base else None,
            (r.quality.kl_divergence < KEEPS, digits(r.quality.kl_divergence)) if r.quality else None,
            (rate >= 1.2 * eager, f"{100 * (rate / eager - 1):+.0f} %") if rate and eager else None,
        )
        for promise, figure in zip(PROMISED, found, strict=True):
            told[promise][r.name] = figure
    return told


def promises_table(results: list[Result]) -> list[Any]:
    """The documentation's promises against what was measured here."""
    measured, rows = promises(results), []
    for promise, row in measured.items():
        cells = [f"[{'green]✓' if c[0] else 'red]✗'} {c[1]}[/]" if c else "–" for c in row.values()]
        rows.append([promise, PROMISED[promise], *cells])
    columns = ("promise", "documented", *measured["quality (KL)"])
    return table("Quanto's promises: ✓ kept, ✗ not kept, – not measured", columns, rows, left=2)


def promise_reasons(results: list[Result]) -> list[str]:
    """Why a promise was not kept, where the program knows."""
    told, kept = [], promises(results)
    for r in results:
        figure = kept["memory saved"].get(r.name)
        if BITS[r.name] == 8 and figure and not figure[0]:
            width = r.unquantized_bytes / r.parameters * 8  # bits a stored parameter has
            most = percent(r.quantizable_bytes / r.unquantized_bytes * (1 - BITS[r.name] / width))
            told.append(f"Memory: embeddings and output stay as stored: 8 bit saves at most {most} %.")
            break
    slow = any(figure and not figure[0] for figure in kept["16-bit speed"].values())
    if slow and not results[0].settings.compile:
        why = "eager Quanto calls Python for every layer and widens weights on every call"
        told.append(f"Speed: {why}: see --compile.")
    return told


def verdict_lines(results: list[Result]) -> list[str]:
    """The answer to "which one?", by plain rules on the figures."""
    speed = {r.name: decode_rate(r.runs) for r in results if decode_rate(r.runs)}
    size = {r.name: r.weight_bytes for r in results if r.name in speed and r.weight_bytes}
    if not size:
        return []
    fastest, smallest = max(speed, key=speed.get), min(size, key=size.get)
    told = f"[bold]Fastest: {fastest}[/] ({digits(speed[fastest])} tokens/s). "
    told += f"[bold]Smallest: {smallest}[/] ({gib(size[smallest])} GiB). "
    shaky = ", ".join(r.name for r in results if (relative_deviation(r.runs) or 0) > UNSTABLE)
    doubt = [f"[bold yellow]Do not count on the speed of {shaky}: see above.[/]"] if shaky else []
    if not any(r.quality for r in results):
        return [told + "Quality was not measured.", *doubt]
    kept = {r.name: size[r.name] for r in results if r.name in size and verdict(r) == "kept"}
    if kept:
        small = [name for name in kept if kept[name] <= 1.01 * min(kept.values())]
        best = max(small, key=speed.get)  # of equally small ones the fastest
        told += f"[bold green]Smallest that keeps the answers: {best}[/] ({gib(size[best])} GiB, {digits(speed[best])} tokens/s)."
    else:
        told += "[bold]No quantized precision keeps the answers.[/]"
    for kind in ("changed", "broken"):
        names = ", ".join(r.name for r in results if verdict(r) == kind)
        told += f" Answers {kind}: {names}." if names else ""
    return [told, *doubt]


# --------------------------------------------------------------------------------------------------- compare


def work(s: Settings, reference: str, pipe: Any, debug: bool) -> None:
    """The body of a comparison's child process: sends ("tell", arguments) and ("result", Result) to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent decides
    quiet_libraries(debug)
    measure(
        s,
        lambda text, live=False: pipe.send(("tell", (text, live))),
        lambda r: pipe.send(("result", r)),
        reference,
        debug,
    )


def compare(s: Settings, tell: Tell, save: Callable[[Result], None], debug: bool = False) -> None:
    """Measure each precision of COMPARE in a process of its own, the unquantized model first.

    Whatever a child says is handed to `save` at once, so that a crash costs only what was not yet measured. A child
    that dies, or says nothing for SILENCE_S seconds, becomes a failed Result.
    """
    context = multiprocessing.get_context("spawn")
    names = sorted((p or "none" for p in s.compare), key=PRECISIONS.index)
    runs = counted(s.runs, "eager run") + f" and {s.runs} compiled" if s.compile else counted(s.runs, "run")
    most = minutes(len(names) * s.runs * (2 if s.compile else 1) * s.max_seconds)
    most += " of runs, and loading and quality; a better estimate follows the first"
    tell(f"{', '.join(names)}: {runs} each, at most {most}")
    tell("getting the model", live=True)
    try:
        fetch(s)  # here, where a long download is no silence
    except Exception as error:  # noqa: BLE001 (as in `measure`)
        if debug:
            traceback.print_exc()
        text, _ = explain(error, Stage("getting the model"))
        save(replace(Result(of_precision(s, names[0])), failure=text))
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qwquanto-") as reference:
        for i, name in enumerate(names):
            rest = f", about {minutes((time.monotonic() - began) / i * (len(names) - i))} to go" if i else ""
            tell(f"{name} ({i + 1} of {len(names)}{rest})")
            result = Result(of_precision(s, name))
            receiver, sender = context.Pipe(duplex=False)
            arguments = (result.settings, reference, sender, debug)
            child = context.Process(target=work, args=arguments, daemon=True)
            child.start()
            sender.close()
            try:
                result, failure = listen(receiver, result, tell, save)
                child.join(timeout=None if failure is None else 0)
            finally:
                child.kill()
                child.join()
            if failure is None and (child.exitcode or not result.devices):
                failure = death(child.exitcode)
            if failure:
                save(replace(result, failure=result.failure or failure))  # its own words say more


def of_precision(s: Settings, name: str) -> Settings:
    return replace(s, weights=None if name == "none" else name)


def listen(receiver: Any, result: Result, tell: Tell, save: Callable) -> tuple[Result, str | None]:
    """Pass on what a child says until its pipe closes: its last Result, and a failure if it fell silent instead."""
    while True:
        try:
            if not receiver.poll(SILENCE_S):
                return result, f"said nothing for {minutes(SILENCE_S)} and was ended"
            kind, message = receiver.recv()
        except (EOFError, OSError):  # ended, or killed in the middle of a message
            return result, None
        if kind == "tell":
            tell(f"{result.name}: {message[0]}", live=message[1])
        else:
            result = message
            save(result)


def death(code: int) -> str:
    """A child's exit code in words."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def minutes(seconds: float) -> str:
    return f"{max(1, seconds):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


# ------------------------------------------------------------------------------------------------------ main


def quiet_libraries(debug: bool) -> None:
    """Only the report and its progress are printed: no warnings and progress bars of libraries."""
    if debug:
        return
    import warnings

    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of processes started from here
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def progress() -> Iterator[Tell]:
    """Progress on standard error: lines that stay, and on a terminal a live line with the time it has taken."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, emoji=False)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    # half of rich's own rate: drawing takes half a millisecond from the runs each time
    options = {"transient": True, "refresh_per_second": 5, "disable": not console.is_terminal}
    with Progress(*columns, console=console, **options) as shown:
        task = shown.add_task("starting")

        def tell(text: str, live: bool = False) -> None:
            if live:
                shown.update(task, description=text)
            else:
                console.print(text, markup=False, soft_wrap=True)

        yield tell


def show(parts: list[Any], file: Any) -> None:
    """Print a report: coloured and wrapped in a terminal, uncut anywhere else."""
    from rich.console import Console

    console = Console(file=file, highlight=False, emoji=False)  # an answer's :key: is no emoji
    console.width = console.width if console.is_terminal else 1000
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    print(*(line.rstrip() for line in captured.get().splitlines()), sep="\n", file=file)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 for a failure, 2 for impossible settings, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # the report has Chinese and bars, whatever the locale
        stream.reconfigure(encoding="utf-8", errors="replace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    s, debug = parse(argv)
    if problems := check(s):
        print(*(f"qwquanto: {problem}" for problem in problems), sep="\n", file=sys.stderr)
        return 2
    if importlib.util.find_spec("rich") is None:
        print(
            "qwquanto: this Python lacks its packages: pip install -r requirements.txt, or .venv/bin/python",
            file=sys.stderr,
        )
        return 1
    quiet_libraries(debug)
    results: dict[str, Result] = {}
    unwritten = ""
    with progress() as tell:

        def save(result: Result) -> None:
            nonlocal unwritten
            results[result.name] = result
            if s.results in (None, "-"):
                return
            try:
                write_results(s.results, list(results.values()))
                unwritten = ""
            except OSError as error:
                unwritten = f"cannot write {s.results}: {error.strerror or error}"

        interrupted = False
        try:
            compare(s, tell, save, debug) if s.compare else measure(s, tell, save, None, debug)
        except KeyboardInterrupt:
            interrupted = True
    out = sys.stderr if s.results == "-" else sys.stdout
    ordered = list(results.values())
    measured = [r for r in ordered if r.memory]
    if measured:
        show(comparison_report(ordered) if s.compare else single_report(ordered[0]), out)
    else:
        failures = dict.fromkeys(f"qwquanto: {r.failure}" for r in ordered if r.failure)
        print(*failures, sep="\n", end="\n" if failures else "", file=sys.stderr)
    if s.results == "-":
        print(to_json(ordered))
    if unwritten:
        print(f"qwquanto: {unwritten}", file=sys.stderr)
    if interrupted:
        kept = "; the report holds what was finished" if measured else ""
        print(f"qwquanto: interrupted{kept}", file=sys.stderr)
        return 130
    return int(bool(unwritten) or any(r.failure and not (r.unavailable and s.compare) for r in ordered))


if __name__ == "__main__":
    sys.exit(main())
