"""Devices, NVML and memory, by stand-ins that count calls."""

from collections import namedtuple
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch
from fake_model import FakeTime

from _qwquanto.channel import Failure
from _qwquanto.worker import devices
from _qwquanto.worker.devices import (
    choose_devices,
    energy_j,
    memory_bandwidth,
    nvml_handles,
    peak_memory,
    processor_share,
    torch_memory,
)


def test_nvml_finds_the_gpu_by_uuid_not_by_number(monkeypatch):
    asked = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: asked.append(uuid) or "handle")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda *_: SimpleNamespace(used=0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-of-{device}")
    )
    handles, notes = nvml_handles(["cuda:1"])
    assert (handles, notes, asked) == ({"cuda:1": "handle"}, [], ["GPU-uuid-of-cuda:1"])


def test_nvml_absent_is_told_once_and_its_figures_are_unknown(monkeypatch):
    def absent():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    handles, notes = nvml_handles(["cuda:0"])
    assert handles == {} and len(notes) == 1 and "no NVML" in notes[0]
    assert energy_j(handles) == {}


def test_a_gpu_that_this_torch_cannot_use_is_told_loudly(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices, notes = choose_devices("auto")
    assert devices == ["cpu"] and f"NVIDIA H200, but this torch ({torch.__version__}) cannot" in notes[0]
    assert "pip install torch --index-url" in notes[0] and "driver is too old" in notes[0]
    assert choose_devices("cpu") == (["cpu"], [])
    with pytest.raises(Failure, match="no device cuda:1 here"):
        choose_devices("cuda:1")


def test_gpus_are_tried_until_one_works(monkeypatch):
    """The others are left alone: trying one takes hundreds of MB of it."""
    tried, ones = [], torch.ones

    def first_is_broken(size, device):
        tried.append(device)
        if device == "cuda:0":
            raise RuntimeError("no kernel image is available")
        return ones(size)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "ones", first_is_broken)
    devices, notes = choose_devices("auto")
    assert devices == ["cuda:1", "cuda:2"] and tried == ["cuda:0", "cuda:1"]
    assert notes == ["cuda:0 does not work: no kernel image is available"]


def test_what_other_programs_use_of_the_processors_is_all_that_is_used_but_by_this_process(monkeypatch):
    """Of those processors that this process may use; steal counts, waiting for a disk does not."""
    times = namedtuple("times", "user nice system idle iowait irq softirq steal guest guest_nice")
    clock, own = [100.0], [5.0]
    busy = {0: times(10, 1, 2, 50, 3, 0.5, 0.5, 1, 4, 1), 1: times(20, *[0] * 9), 2: times(*[0] * 10)}
    me = SimpleNamespace(
        cpu_affinity=lambda: [0, 1], cpu_times=lambda: SimpleNamespace(user=own[0], system=1.0)
    )
    monkeypatch.setattr(psutil, "Process", lambda: me)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [busy[i] for i in range(3)])
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(devices, "has_cpu_quota", lambda: False)
    share = processor_share()
    clock[0] += 0.5
    assert share() is None, "the system counts in hundredths of a second"
    clock[0] += 9.5
    own[0] += 12
    busy[0] = times(10 + 6, 1, 2, 50 + 1, 3 + 2, 0.5, 0.5, 1 + 1, 4 + 3, 1)  # 7 of 10 s in use
    busy[1] = times(20 + 8, *[0] * 9)
    busy[2] = times(500, *[0] * 9)
    assert share() == pytest.approx((7 + 8 - 12) / 20)
    own[0] = 5.0
    assert share() == pytest.approx((7 + 8) / 20)
    own[0] = 500.0
    assert share() == 0.0


@pytest.mark.parametrize(
    ("files", "limited"),
    [
        ({"cpu.max": "max 100000"}, False),
        ({"cpu.max": "200000 100000"}, True),
        ({"cpu/cpu.cfs_quota_us": "-1"}, False),
        ({"cpu/cpu.cfs_quota_us": "200000"}, True),
        ({}, False),
    ],
)
def test_in_a_container_whose_use_is_limited_by_time_others_are_unknown(
    monkeypatch, tmp_path, files, limited
):
    """It sees what all programs of the whole computer use."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(devices, "Path", lambda folder, name: tmp_path / name)
    assert devices.has_cpu_quota() == limited
    if limited:
        assert processor_share()() is None


def test_a_peak_is_of_its_block_alone(monkeypatch):
    """CUDA's allocator keeps a peak since the last reset, by a stand-in for each device."""
    held = {"cuda:0": {"current": 20, "peak": 100}, "cuda:1": {"current": 5, "peak": 50}}

    def reset(device):
        held[device]["peak"] = held[device]["current"]

    def stats(device):
        return {
            f"{what}_bytes.all.{kind}": more + value
            for what, more in (("allocated", 0), ("reserved", 1000))
            for kind, value in held[device].items()
        }

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    polled = iter([{"rss": 7}, {"rss": 9}, {"rss": 8}])
    monkeypatch.setattr(devices, "polled_memory", lambda *_: next(polled, {"rss": 1}))
    with peak_memory(list(held), {}) as peak:
        held["cuda:0"] = {"current": 25, "peak": 30}
        first = peak()
        second = [peak()["rss"] for _ in range(3)][-1]
    assert (first["cuda:0 allocated"], first["cuda:0 reserved"]) == (30, 1030)
    assert (first["cuda:1 allocated"], first["cuda:1 reserved"]) == (5, 1005)
    assert second == 9
    assert torch_memory(["cuda:0", "cpu"], "current") == {"cuda:0 allocated": 25, "cuda:0 reserved": 1025}


def test_bandwidth_is_bytes_read_and_written_over_finished_work(monkeypatch):
    """A device that works 2 s for each job, and only while somebody waits for it."""
    clock, pending = FakeTime(), [5.0]  # of what came before

    def synchronize(devices):
        assert devices == ["cpu"]
        clock.now += pending.pop() if pending else 2.0

    monkeypatch.setattr(devices, "time", clock)
    monkeypatch.setattr(devices, "synchronize", synchronize)
    monkeypatch.setattr(devices, "memory_of", lambda device: (2**20 * 8, 2**30))
    assert memory_bandwidth("cpu") == 2 * 2**20 / 2.0  # a copy reads and writes
