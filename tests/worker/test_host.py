"""What a worker learns of its machine while it times: throttling, and the yardstick of the host."""

import contextlib
import threading

import pynvml
import pytest
import torch
from fake_model import FakeModel, bench
from results import (
    compiled,
    run,
    settings,
)

from _qwquanto.compiled.prepare import SCRIPT_STEP, STATIC_CACHE, CompiledDecode
from _qwquanto.results import Result
from _qwquanto.worker import devices, generation, measure
from _qwquanto.worker.devices import host_yardstick, peak_memory, throttle_reasons


class Driver:
    """NVML's answers: an old driver lacks the newer name."""

    def __init__(self, monkeypatch, *bits, old=False):
        def newer(handle):
            if old:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
            return answers()

        answers = iter(bits).__next__
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", newer)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda handle: answers())


def test_nvmls_reasons_in_words(monkeypatch):
    idle, power, heat, hot = 0x1, 0x4, 0x20, 0x40
    Driver(monkeypatch, idle, power | idle, heat | hot)
    handles = {"cuda:0": "a"}
    found = [throttle_reasons(handles) for _ in range(3)]
    assert found == [set(), {"its power limit"}, {"heat"}] and throttle_reasons({}) == set()
    Driver(monkeypatch, heat, old=True)
    assert throttle_reasons(handles) == {"heat"}


def test_a_driver_that_tells_no_reasons_costs_nothing(monkeypatch):
    def unknown(handle):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        monkeypatch.setattr(pynvml, name, unknown)
    assert throttle_reasons({"cuda:0": "a"}) == set()


def test_the_thread_that_polls_memory_sees_throttling(monkeypatch):
    looks, four = [], threading.Event()

    def reasons(handles):
        looks.append(handles)
        if len(looks) == 4:
            four.set()
        return {"heat"} if len(looks) < 3 else set()

    monkeypatch.setattr(devices, "throttle_reasons", reasons)
    monkeypatch.setattr(devices, "polled_memory", lambda *_: {"rss": 7})
    shares = {}
    with peak_memory([], {"cuda:0": "a"}, shares) as peak:
        assert four.wait(60)
    assert peak()["rss"] == 7 and shares == {"heat": 2 / len(looks)} and looks[0] == {"cuda:0": "a"}


def test_the_yardstick_is_laid_before_between_and_after_the_runs(monkeypatch):
    """Eager and compiled; on the device under test, and outside of what is timed.

    None on a CPU, where others' use of it is measured beside each run (`processor_share`).
    """
    order = []

    def yardstick(device):
        order.append(device)
        return lambda: order.append("yardstick") or 0.05

    monkeypatch.setattr(generation, "host_yardstick", yardstick)
    monkeypatch.setattr(generation, "run_once", lambda *_: order.append("run") or run())
    for name in ("save", "log"):
        monkeypatch.setattr(generation, name, lambda *_: None)
    r = Result(settings(), compiled=compiled())
    mine = bench(FakeModel(None, []))
    generation.timed_runs(mine, r, r, 2)
    assert order == ["run", "run"] and r.host_s == []
    mine.devices = ["mps"]
    monkeypatch.setattr(generation, "peak_memory", lambda *_: contextlib.nullcontext(dict))
    for target in (r, r.compiled):
        order.clear()
        generation.timed_runs(mine, r, target, 2)
        assert order == ["mps", "yardstick", "run", "yardstick", "run", "yardstick"]
        assert target.host_s == [0.05] * 3


def test_the_yardstick_is_a_fixed_number_of_products_between_two_synchronizations(monkeypatch):
    calls = []
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: calls.append("product") or real(*a))
    monkeypatch.setattr(devices, "synchronize", lambda which: calls.append(which))
    seconds = host_yardstick("cpu")
    calls.clear()
    assert seconds() > 0
    assert calls == [["cpu"], *["product"] * 250, ["cpu"]]


@pytest.mark.parametrize(
    ("way", "on_gpu"), [(SCRIPT_STEP, True), (SCRIPT_STEP, False), (STATIC_CACHE, False)]
)
def test_what_a_gpu_needs_for_a_compiled_step_is_measured_warm_in_the_middle_of_a_run(
    monkeypatch, way, on_gpu
):
    order = []
    replay_s = (lambda length: order.append(length) or 0.002) if on_gpu else None
    monkeypatch.setattr(measure, "prepare_compiled_decode", lambda *_: CompiledDecode(way, 3, {}, replay_s))
    for name in ("save", "log"):
        monkeypatch.setattr(measure, name, lambda *_: None)
    monkeypatch.setattr(measure, "warmup_runs", lambda *_: order.append("warm-up") or [])
    monkeypatch.setattr(measure, "timed_runs", lambda *_: order.append("runs"))
    mine, r = bench(FakeModel(None, [])), Result(settings())
    mine.prompt, mine.new_tokens = torch.ones(1, 10, dtype=torch.long), 64
    measure.measure_compiled(mine, r, None)
    assert (r.compiled.way, r.compiled.step_s) == (way, 0.002 if on_gpu else None)
    assert order == ["warm-up", *[42] * on_gpu, "runs"]


def test_what_others_use_is_told_of_each_run_on_a_cpu_and_noted_of_a_gpus_host(monkeypatch):
    """A run within a second takes the share of all runs so far: the system's clock is too coarse for it."""
    shares = iter([0.3, None, 0.0])

    def processor_share():
        started.append(len(started))
        return (lambda: 0.25) if len(started) == 1 else lambda: next(shares)

    monkeypatch.setattr(generation, "processor_share", processor_share)
    monkeypatch.setattr(generation, "run_once", lambda *_: run())
    monkeypatch.setattr(generation, "host_yardstick", lambda device: lambda: 0.05)
    monkeypatch.setattr(generation, "peak_memory", lambda *_: contextlib.nullcontext(dict))
    for name in ("save", "log"):
        monkeypatch.setattr(generation, name, lambda *_: None)
    mine, r, started = bench(FakeModel(None, [])), Result(settings()), []
    generation.timed_runs(mine, r, r, 3)
    assert [one.others_cpu for one in r.runs] == [0.3, 0.25, 0.0] and r.notes == []
    shares, mine.devices, started, r = iter([0.3] * 3), ["mps"], [], Result(settings())
    generation.timed_runs(mine, r, r, 3)
    assert [one.others_cpu for one in r.runs] == [None] * 3
    assert r.notes == [
        "other programs used over 20 % of the host's processors during the runs, which may be too slow by it"
    ]
