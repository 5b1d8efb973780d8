"""Devices, NVML and memory, by stand-ins that count calls."""

from types import SimpleNamespace

import pynvml
import pytest
import torch

from _qwquanto.channel import Failure
from _qwquanto.worker.devices import busy_note, choose_devices, energy_j, nvml_handles


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


def test_a_busy_processor_is_noted(monkeypatch):
    for percent, notes in ((5.0, 0), (60.0, 1)):
        monkeypatch.setattr("psutil.cpu_percent", lambda interval, percent=percent: percent)
        assert len(busy_note("at the start")) == notes
