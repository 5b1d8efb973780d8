"""Devices, their memory, bandwidth and energy, and how fast their host is now. torch, psutil and NVML.

Another kind of device also concerns DEVICE's rule (settings), BETWEEN_PROCESSES (stats), `device_peak` and
`context_that_fits` (fit), `untested` (verdicts), `generate` and `profile_a_step` (generation), `set_up`
(measure) and INT4_ROWS (quanto).
"""

from __future__ import annotations

import contextlib
import platform
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch

from _qwquanto.channel import Failure, first_line

THROTTLING = {  # what NVML says of a GPU that runs slower than it could -> the reason in words
    pynvml.nvmlClocksEventReasonSwPowerCap: "its power limit",
    pynvml.nvmlClocksEventReasonHwSlowdown: "heat or power, by its hardware",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "heat",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "heat",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "the power supply",
}


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


def has_cpu_quota() -> bool:
    """Whether a container limits how much time its programs get of all processors (docker --cpus)."""
    for file, unlimited in (("cpu.max", "max"), ("cpu/cpu.cfs_quota_us", "-1")):
        with contextlib.suppress(OSError):
            return Path("/sys/fs/cgroup", file).read_text().split()[:1] != [unlimited]
    return False


def processor_share() -> Callable[[], float | None]:
    """A function that tells which share of the processors others have used since now, from 0 to 1.

    Of those that this process may use; what a hypervisor gave to other machines (steal) counts as well. None
    within a second, since the system counts in hundredths, and in a container whose use is limited by time,
    which sees the whole computer's.
    """
    if has_cpu_quota():
        return lambda: None
    me = psutil.Process()
    mine = me.cpu_affinity() if hasattr(me, "cpu_affinity") else range(psutil.cpu_count())

    def used() -> tuple[float, float]:
        """Seconds: of all on these processors, and of this process."""
        every = [seconds for i, seconds in enumerate(psutil.cpu_times(percpu=True)) if i in mine]
        idle = sum(seconds.idle + getattr(seconds, "iowait", 0) for seconds in every)
        twice = sum(getattr(s, "guest", 0) + getattr(s, "guest_nice", 0) for s in every)  # in user's, too
        own = me.cpu_times()
        return sum(map(sum, every)) - idle - twice, own.user + own.system

    begin, all_before, own_before = time.perf_counter(), *used()

    def share() -> float | None:
        seconds = time.perf_counter() - begin
        if seconds < 1:
            return None
        all_now, own_now = used()
        others = (all_now - all_before) - (own_now - own_before)
        return min(1.0, max(0.0, others / (seconds * len(mine))))

    return share


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


def gpu_memory_in_use() -> dict[str, int]:
    """Bytes in use on each GPU, by NVML; empty where it cannot tell. Asked before this process touches one:
    CUDA's context, some 0.6 GiB, then counts as the program's.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with contextlib.suppress(RuntimeError):  # a GPU that does not work: `choose_devices` says so
        handles, _ = nvml_handles([f"cuda:{i}" for i in range(count)])
        return {device: device_memory_used(handle) for device, handle in handles.items()}
    return {}


def energy_j(handles: dict[str, Any]) -> dict[str, float]:
    """Joules that each GPU has used since its driver was loaded (Volta and newer); empty without a count."""
    try:
        return {d: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 for d, handle in handles.items()}
    except pynvml.NVMLError:
        return {}


def throttle_reasons(handles: dict[str, Any]) -> set[str]:
    """Why the GPUs run slower now than they could; empty where the driver does not tell."""
    now = 0
    for handle in handles.values():
        # the second is the first's name until 2023, which older drivers alone have
        for ask in (
            pynvml.nvmlDeviceGetCurrentClocksEventReasons,
            pynvml.nvmlDeviceGetCurrentClocksThrottleReasons,
        ):
            with contextlib.suppress(pynvml.NVMLError):
                now |= ask(handle)
                break
    return {text for bit, text in THROTTLING.items() if now & bit}


def host_yardstick(device: str) -> Callable[[], float]:
    """A function that takes the seconds of a fixed job, which tell how fast the host of a device is now.

    As in decode: a product of a vector and a matrix, and many small operations after it, whose calls from
    Python take the time. Some 40 ms: less fits between two turns of another program.
    """
    functional = torch.nn.functional
    vector, matrix = torch.ones(1, 1024, device=device), torch.ones(1024, 1024, device=device)

    def seconds() -> float:
        synchronize([device])
        begin = time.perf_counter()
        for _ in range(250):
            x = functional.linear(vector, matrix)
            for _ in range(2):
                x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1)
                x = functional.silu(x) + functional.softmax(x, -1)
        synchronize([device])
        return time.perf_counter() - begin

    seconds()  # the first visit is slower
    return seconds


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


def memory_of(device: str) -> tuple[int, int]:
    """Bytes that can still be taken on a device, and all it has: its own memory, or the computer's."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)
    return psutil.virtual_memory().available, psutil.virtual_memory().total


def torch_memory(devices: list[str], kind: str) -> dict[str, int]:
    """Bytes of torch's CUDA allocators, "cuda:0 allocated" and "… reserved"; "peak" is since the reset."""
    seen = {}
    for device in devices:
        if device.startswith("cuda"):
            stats = torch.cuda.memory_stats(device)
            seen[f"{device} allocated"] = stats.get(f"allocated_bytes.all.{kind}", 0)
            seen[f"{device} reserved"] = stats.get(f"reserved_bytes.all.{kind}", 0)
    return seen


def polled_memory(devices: list[str], handles: dict[str, Any]) -> dict[str, int]:
    """Bytes now of what keeps no peak: "cuda:0 used" (whole device), MPS's allocator, "rss" (process)."""
    seen = {}
    for device in devices:
        if device in handles:
            seen[f"{device} used"] = device_memory_used(handles[device])
        if device == "mps":
            seen["mps allocated"] = torch.mps.current_allocated_memory()
            seen["mps reserved"] = torch.mps.driver_allocated_memory()
    return seen | {"rss": psutil.Process().memory_info().rss}


def snapshot(devices: list[str], handles: dict[str, Any]) -> dict[str, int]:
    """Bytes now, of all kinds."""
    return torch_memory(devices, "current") | polled_memory(devices, handles)


@contextlib.contextmanager
def peak_memory(
    devices: list[str], handles: dict[str, Any], throttled: dict[str, float] | None = None
) -> Iterator[Callable[[], dict[str, int]]]:
    """Watches memory within the block; the function it yields gives the peaks so far, named as in `snapshot`.

    A thread polls, ten times a second, what keeps no peak itself; polling CUDA's allocator would slow runs.
    The function also fills `throttled`: reason -> share of the time in which the GPUs were slowed down by it.
    """
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
    seen = {}
    reasons = []  # of each look
    ended = threading.Event()

    def look() -> dict[str, int]:
        for name, value in polled_memory(devices, handles).items():
            seen[name] = max(value, seen.get(name, 0))
        return seen

    def watch() -> None:
        while not ended.wait(0.1):
            look()
            reasons.append(throttle_reasons(handles))

    def peaks() -> dict[str, int]:
        if throttled is not None:
            counts = Counter(reason for found in reasons for reason in found)
            throttled.update({reason: count / len(reasons) for reason, count in counts.items()})
        return torch_memory(devices, "peak") | look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()
