"""Measuring with a fake generate() and a fake clock: what was called and what was counted, never how long it took."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import qwquanto as q


class FakeTime:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class FakeModel:
    """generate() that takes `first` seconds to the first token, `gap` for each further one, and gives these tokens."""

    def __init__(self, time, tokens, gap=0.5, first=2.0):
        self.time, self.tokens, self.gap, self.first, self.calls = time, tokens, gap, first, []
        self.generation_config = SimpleNamespace(eos_token_id=[7, 8])

    def generate(self, ids, attention_mask, stopping_criteria, **options):
        self.calls.append(options | {"seed": torch.initial_seed()})
        for i, token in enumerate(self.tokens[: options["max_new_tokens"]]):
            self.time.now += self.gap if i else self.first
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            stop = [criterion(ids, None) for criterion in stopping_criteria]
            if any(stop):
                break
        self.time.now += 0.25  # what generate() does after the last token
        return ids


def rig(model, **more):
    told = {"model": model, "tokenizer": None, "prompt": torch.ones(1, 3, dtype=torch.long), "new_tokens": 10}
    return q.Rig(**(told | {"room": 100, "exact": False, "devices": ["cpu"], "handles": {}} | more))


@pytest.fixture
def time(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(q, "time", fake)
    return fake


def silent(*_, **__):
    pass


def test_n_tokens_have_n_minus_one_intervals(time):
    run = q.run_once(q.Settings(), rig(FakeModel(time, [1, 2, 3, 4, 8])), 5, silent, "run")
    assert (run.prompt_tokens, run.generated_tokens, run.stop_reason, run.seed) == (3, 5, "eos", 5)
    assert (run.ttft_s, run.latency_s, run.inter_token_s) == (2.0, 4.25, [0.5] * 4)
    assert run.decode_tokens_per_s == 2.0 and run.tokens_per_s == pytest.approx(5 / 4.25)
    assert run.energy_j is None


def test_a_model_that_stops_at_its_first_token_counts(time):
    run = q.run_once(q.Settings(), rig(FakeModel(time, [7])), 0, silent, "run")
    assert (run.generated_tokens, run.stop_reason, run.decode_tokens_per_s, run.inter_token_s) == (
        1,
        "eos",
        None,
        [],
    )


def test_runs_end_by_time_and_by_length(time):
    s = replace(q.Settings(), max_seconds=3.4)
    run = q.run_once(s, rig(FakeModel(time, [1] * 10)), 0, silent, "run")
    assert (run.stop_reason, run.generated_tokens) == ("time", 4)
    run = q.run_once(q.Settings(), rig(FakeModel(time, [1] * 10), new_tokens=3), 0, silent, "run")
    assert (run.stop_reason, run.generated_tokens) == ("length", 3)
    run = q.run_once(
        replace(s, max_seconds=2.9), rig(FakeModel(time, [1] * 10), new_tokens=3), 0, silent, "run"
    )
    assert (run.stop_reason, run.generated_tokens) == ("length", 3), (
        "the last token passed the limit: it is whole"
    )


def test_the_warm_up_keeps_max_new_tokens_and_ends_early(time):
    def warm(gap):
        model = FakeModel(time, [1] * 100, gap=gap, first=gap)
        run = q.run_once(q.Settings(), rig(model, new_tokens=100), 0, silent, "warm-up", warm_up=True)
        assert model.calls[0]["max_new_tokens"] == 100  # the same static cache as in the timed runs
        return run.generated_tokens

    assert warm(10.0) == q.WARMUP_TOKENS  # slow: a few tokens
    assert warm(0.125) == q.WARMUP_S / 0.125  # fast: a few seconds


def test_short_warm_up_runs_are_repeated(time):
    def runs(wanted):
        model = FakeModel(time, [1] * 4, gap=0.25, first=0.5)  # 1.5 s each
        return len(q.warmup_runs(replace(q.Settings(), warmup_runs=wanted), rig(model), silent, "warm-up"))

    assert [runs(0), runs(1), runs(6)] == [0, 4, 6]


def test_options_and_seeds_that_generate_gets(time):
    model = FakeModel(time, [1] * 10)
    q.run_once(q.Settings(), rig(model), 3, silent, "run")
    q.run_once(replace(q.Settings(), do_sample=False), rig(model, exact=True), 4, silent, "run")
    sampled = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.7, "pad_token_id": 0, "seed": 3}
    greedy = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "seed": 4}
    assert model.calls == [sampled, greedy]


def test_energy_is_a_difference_per_device_and_none_for_short_runs(time, monkeypatch):
    readings = iter([{"cuda:0": 10.0, "cuda:1": 5.0}, {"cuda:0": 14.0, "cuda:1": 6.0}] * 2)
    monkeypatch.setattr(q, "energy_j", lambda handles: next(readings))
    run = q.run_once(q.Settings(), rig(FakeModel(time, [1] * 10)), 0, silent, "run")
    assert run.energy_j == {"cuda:0": 4.0, "cuda:1": 1.0} and q.joules(run) == 5
    short = FakeModel(time, [1, 1], gap=0.1, first=0.1)
    assert q.run_once(q.Settings(), rig(short, new_tokens=2), 0, silent, "run").energy_j is None


def test_progress_tells_live_tokens_a_second(time):
    told = []
    q.run_once(
        q.Settings(),
        rig(FakeModel(time, [1] * 5)),
        0,
        lambda text, live: told.append((text, live)),
        "run 1 of 5",
    )
    assert told[1] == ("run 1 of 5: 2 tokens, 0.8 tokens/s", True)


def test_prefill_is_512_tokens_a_median_and_shorter_on_a_slow_machine(time):
    calls, seconds = [], {32: 1.0}

    class Slow:
        config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(vocab_size=100, max_position_embeddings=2048)
        )

        def generate(self, ids, stopping_criteria, **_):
            calls.append(ids.shape[1])
            time.now += seconds[32] * ids.shape[1] / 32
            stopping_criteria[0](ids, None)

    assert q.prefill_rate(q.Settings(), rig(Slow()), silent) == (512, 32.0)
    assert calls == [32, 512]  # 16 s: once is enough
    seconds[32], calls[:] = 0.1, []
    assert q.prefill_rate(q.Settings(), rig(Slow()), silent) == (512, pytest.approx(320))
    assert calls == [32, 512, 512, 512, 512]
    seconds[32], calls[:] = 20.0, []
    assert q.prefill_rate(q.Settings(), rig(Slow()), silent)[0] == 64


def test_utilization_over_two_gpus_is_the_sum_of_each_ones_time(monkeypatch):
    import test_statistics as hand_made

    sizes = {"cuda:0": 300, "cuda:1": 100}
    parameters = [SimpleNamespace(device=torch.device(d), size=size) for d, size in sizes.items()]
    model = SimpleNamespace(parameters=lambda: iter(parameters))
    monkeypatch.setattr(q, "stored_bytes", lambda tensors: sum(t.size for t in tensors))
    r = hand_made.result(decode=2.0, memory_bytes_per_s={"cuda:0": 3000.0, "cuda:1": 500.0})
    two = replace(rig(model), reads=(400, 0))
    found = q.utilization(r, two)
    assert found == {"bytes_per_token": 400, "bandwidth_utilization": pytest.approx((0.1 + 0.2) * 2)}
    parameters[:] = [SimpleNamespace(device=torch.device("mps:0"), size=5)]
    r = hand_made.result(decode=2.0, memory_bytes_per_s={"mps": 1000.0})
    assert q.utilization(r, two)["bandwidth_utilization"] == pytest.approx(0.8)


def test_a_compiled_step_reads_whole_windows_but_not_on_cuda():
    import test_statistics as hand_made

    def bytes_on(device):
        prompt = SimpleNamespace(shape=(1, 3), device=torch.device(device))
        compiled = rig(None, prompt=prompt, reads=(400, 10), compile_options={"past_key_values": None})
        return q.utilization(hand_made.result(decode=None, runs=[hand_made.run(None)]), compiled)[
            "bytes_per_token"
        ]

    assert (bytes_on("cpu"), bytes_on("cuda:0")) == (400 + 10 * 256, 400 + 45)


def test_nvml_finds_the_gpu_by_uuid_not_by_number(monkeypatch):
    import pynvml

    asked = []
    monkeypatch.setattr(pynvml, "nvmlInit", silent)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: asked.append(uuid) or "handle")
    monkeypatch.setattr(q, "device_memory_used", lambda handle: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-of-{device}")
    )
    handles, notes = q.nvml_handles(["cuda:1"])
    assert (handles, notes, asked) == ({"cuda:1": "handle"}, [], ["GPU-uuid-of-cuda:1"])


def test_nvml_absent_is_told_once_and_its_figures_are_unknown(monkeypatch):
    import pynvml

    def absent():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    handles, notes = q.nvml_handles(["cuda:0"])
    assert handles == {} and len(notes) == 1 and "no NVML for cuda:0" in notes[0]
    assert q.energy_j(handles) == {} and q.nvml_names() == []


def test_a_gpu_that_this_torch_cannot_use_is_told_loudly(monkeypatch):
    monkeypatch.setattr(q, "nvml_names", lambda: ["NVIDIA H200"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    devices, notes = q.choose_devices("auto")
    assert devices == ["cpu"] and "NVIDIA H200" in notes[0] and "pip install torch" in notes[0]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver is too old" in q.choose_devices("auto")[1][0]
    with pytest.raises(q.Failure, match="no device cuda:1 here"):
        q.choose_devices("cuda:1")


def test_gpus_are_tried_until_one_works(monkeypatch):
    """The others are left alone: trying one takes hundreds of MB of it."""
    tried, ones = [], torch.ones

    def first_is_broken(size, device):
        tried.append(device)
        if device == "cuda:0":
            raise RuntimeError("no kernel image is available")
        return ones(size)

    monkeypatch.setattr(q, "nvml_names", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "ones", first_is_broken)
    devices, notes = q.choose_devices("auto")
    assert devices == ["cuda:1", "cuda:2"] and tried == ["cuda:0", "cuda:1"]
    assert notes == ["cuda:0 does not work: no kernel image is available"]


def test_a_busy_processor_is_noted(monkeypatch):
    for percent, notes in ((5.0, 0), (60.0, 1)):
        monkeypatch.setattr("psutil.cpu_percent", lambda interval, percent=percent: percent)
        assert len(q.busy_note()) == notes


def test_one_gpu_if_the_model_fits_it_else_all(monkeypatch):
    model = torch.nn.Linear(8, 8, bias=False, dtype=torch.float32, device="meta")  # 256 bytes
    monkeypatch.setattr(q, "expected_bytes", lambda model, precision: 256)
    free, total = {"cuda:0": 200, "cuda:1": 1000}, [1000]
    monkeypatch.setattr(q, "memory_of", lambda device: (free[device], *total))
    notes = []
    assert q.fit(q.Settings(), model, list(free), silent, notes) == ["cuda:1"] and not notes
    free["cuda:1"] = 200
    assert q.fit(q.Settings(), model, list(free), silent, notes) == ["cuda:0", "cuda:1"] and not notes
    free["cuda:1"] = 10
    assert (
        q.fit(q.Settings(), model, list(free), silent, notes) == ["cuda:0", "cuda:1"] and "only" in notes[0]
    )
    total[0] = 100
    with pytest.raises(q.Failure, match="need"):
        q.fit(q.Settings(), model, list(free), silent, notes)


def test_results_go_where_a_link_points(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    q.write_results(str(tmp_path / "link.json"), [])
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "target.json").read_text().startswith("{")


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    q.write_results(str(path), [q.Result(q.Settings(), load_s=1.5)])
    monkeypatch.setattr(q.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        q.write_results(str(path), [q.Result(q.Settings(), load_s=2.5)])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    told = json.loads(path.read_text(encoding="utf-8"))["results"][0]
    assert told["load_s"] == 1.5 and told["settings"]["model_name"] == q.MODEL_NAME


def test_a_later_write_makes_up_for_one_that_failed(tmp_path, monkeypatch, capsys):
    def main(*works):
        write, works = q.write_results, iter(works)

        def write_or_fail(path, results):
            if not next(works):
                raise OSError(28, "No space left on device")
            write(path, results)

        with monkeypatch.context() as patch:
            patch.setattr(q, "write_results", write_or_fail)
            patch.setattr(q, "measure", lambda s, tell, save, *_: [save(q.Result(s)), save(q.Result(s))])
            code = q.main(["--results", str(tmp_path / "r.json")])
        return code, "No space left on device" in capsys.readouterr().err

    assert main(True, False) == (1, True)
    assert main(False, True) == (0, False)


def test_whatever_goes_wrong_before_the_first_precision_is_a_line(monkeypatch):
    def broken(s):
        raise ImportError("No module named 'hf_xet'")

    saved = []
    monkeypatch.setattr(q, "fetch", broken)
    q.compare(replace(q.Settings(), compare=("none", "int8")), silent, saved.append)
    assert [r.failure for r in saved] == ["No module named 'hf_xet': pip install -r requirements.txt"]
