"""Each number of a GPU against an independent witness. Run: python -m pytest -m gpu -s tests/test_gpu.py

Qwen2.5-3B's shape with random weights, int8 unless said otherwise. REQUIRE_GPU=1 makes a skip an error. `-s`
shows the table of witnesses.
"""

import gc
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import SCRIPT, alternate, arguments, paired_interval
from optimum.quanto import QLinear, qfloat8, qint2, qint4, qint8
from results import settings

from _qwquanto.compiled.layers import dequant_linear
from _qwquanto.compiled.ops import flash_decode
from _qwquanto.compiled.prepare import SCRIPT_STEP, graphs_compiled, prepare_compiled_decode
from _qwquanto.settings import PRECISIONS
from _qwquanto.stats import joules_per_token
from _qwquanto.worker.devices import memory_bandwidth, nvml_handles, peak_memory, snapshot
from _qwquanto.worker.generation import (
    Bench,
    cudnn_attention,
    generate,
    generation_options,
    profile_a_step,
    run_once,
)
from _qwquanto.worker.loading import decode_weight_bytes, load_model, make_meta_model, weight_stats
from _qwquanto.worker.measure import tokenize
from _qwquanto.worker.quanto import leave_out_cudnn_attention, patch_quanto

pytestmark = pytest.mark.gpu
GPU = ["cuda:0"]


def smi(what, device="0"):
    """One figure of nvidia-smi, of the GPU that torch calls cuda:N."""
    uuid = f"GPU-{torch.cuda.get_device_properties(int(device)).uuid}"
    shown = subprocess.run(
        ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "-i", uuid],
        capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    return float(shown.stdout)


def witness(name, ours, theirs, tolerance):
    """Print and assert that two figures agree within a relative tolerance."""
    print(f"| {name} | {ours:.6g} | {theirs:.6g} | {ours / theirs - 1:+.2%} |", flush=True)
    assert ours == pytest.approx(theirs, rel=tolerance), name


@pytest.fixture(scope="module")
def bench():
    """Qwen2.5-3B's shape in int8 on the first GPU."""
    s = settings(random_weights=True, device="cuda:0", compare=("int8",))
    handles, notes = nvml_handles(GPU)
    assert not notes
    model = load_model(s, None, make_meta_model(s, None), GPU)
    prompt = tokenize(s, None, model.config).to("cuda:0")
    yield Bench(
        s, GPU, handles, model=model, prompt=prompt, new_tokens=48, positions_left=4096,
    )  # fmt: skip
    del model
    torch.cuda.empty_cache()


def storage_bytes():
    """Bytes of all storages on the GPU that some tensor of this process holds."""
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.is_cuda]
    storages = {}
    for tensor in tensors:
        if not hasattr(tensor, "__tensor_flatten__"):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_memory(bench):
    """Held against the sum over storages, against nvidia-smi, and against blocks of a size that is known."""
    seen = snapshot(GPU, bench.handles)
    witness(
        "weights B, against all storages",
        weight_stats(bench.model, GPU)["weight_bytes"],
        storage_bytes(),
        0.01,
    )
    witness("allocated B, against all storages", seen["cuda:0 allocated"], storage_bytes(), 0.01)
    witness("device used MiB, against nvidia-smi", seen["cuda:0 used"] / 2**20, smi("memory.used"), 0.01)
    before, size = smi("memory.used"), 3 * 2**30
    with peak_memory(GPU, bench.handles) as peak:
        block = torch.empty(size, dtype=torch.uint8, device="cuda:0")
        during, held = snapshot(GPU, bench.handles), smi("memory.used")
        del block
        highest = peak()
    torch.cuda.empty_cache()
    for name, found in (
        ("allocated", during),
        ("allocated", highest),
        ("reserved", during),
        ("reserved", highest),
    ):
        witness(f"{name} B of a block", found[f"cuda:0 {name}"] - seen[f"cuda:0 {name}"], size, 0.01)
    witness(
        "used MiB of a block, against nvidia-smi",
        (during["cuda:0 used"] - seen["cuda:0 used"]) / 2**20,
        held - before,
        0.02,
    )


def test_bandwidth():
    size = 2**30
    source, target = torch.ones(size // 4, device="cuda:0"), torch.empty(size // 4, device="cuda:0")
    times = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    witness(
        "memory GB/s, against CUDA events",
        memory_bandwidth("cuda:0") / 1e9,
        2 * size / min(times[5:]) / 1e9,
        0.05,
    )


def test_speed(bench):
    """tokens/s against a stopwatch around a bare generate(), TTFT against max_new_tokens=1; in pairs."""
    short = replace(bench, new_tokens=16)
    bare = generation_options(short) | {"attention_mask": torch.ones_like(bench.prompt), "pad_token_id": 0}

    def stopwatch(seed, **more):
        torch.manual_seed(seed)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        bench.model.generate(bench.prompt, **(bare | more))
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def compare(name, measured, plain, most):
        """The ratio's interval lies within the limits: noise cannot make it pass, and takes more pairs."""
        made, high, low = ([], []), math.inf, 1
        while high / low > most and len(made[0]) < 96:
            for seconds, more in zip(made, alternate(measured, plain, 16), strict=True):
                seconds += more
            ratio, low, high = paired_interval(*made)
        print(f"| {name} | {ratio:.4f} ({low:.4f} to {high:.4f}) | 1 | |", flush=True)
        assert low >= 1 / most and high <= most, name

    latency = lambda seed: run_once(short, seed, "run").latency_s
    first = lambda seed: run_once(short, seed, "run").ttft_s
    compare("latency over a stopwatch's (95 % interval)", latency, stopwatch, 1.15)
    compare("TTFT over max_new_tokens=1", first, lambda seed: stopwatch(seed, max_new_tokens=1), 1.15)


def kernel_names(bench):
    """Of a token's kernels on the GPU."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        generate(bench, "profiled", **generation_options(replace(bench, new_tokens=3)))
    return [e.key for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_no_timed_token_plans_attention(bench):
    """Upstream: torch takes cuDNN's attention on Hopper and plans it anew for each context length.

    The day when the second half fails, `leave_out_cudnn_attention` can go.
    """
    was_on = leave_out_cudnn_attention(False)
    names = kernel_names(bench)
    assert names and not [name for name in names if "cudnn" in name and "norm" not in name.lower()], names
    if torch.cuda.get_device_capability() == (9, 0):
        prompt = bench.prompt.repeat(1, 7)  # lengths that no test has had before
        found = cudnn_attention(replace(bench, left_out_cudnn=True, prompt=prompt))
        print(f"| cuDNN's attention, ms a token: first, again | {found} | | |", flush=True)
        assert was_on and found["first"] > 1.2 * found["again"]
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_gpu_at_work(bench):
    """Kernels take at least the time to read each weight once, and at most that of the whole step."""
    calls, seconds = profile_a_step(bench)
    rate = run_once(bench, 0, "run").decode_tokens_per_s
    print(f"| GPU at work in an eager int8 step | {seconds * rate:.1%} | | |", flush=True)
    assert calls and decode_weight_bytes(bench.model) / memory_bandwidth("cuda:0") < seconds < 1 / rate


def test_energy(bench):
    """The counter's difference over a long run against the integral of nvidia-smi's power."""
    watts, ended = [], threading.Event()

    def watch():
        while not ended.is_set():
            watts.append((time.perf_counter(), smi("power.draw.instant")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.5)
    begin = time.perf_counter()
    run = run_once(replace(bench, new_tokens=200), 0, "run")
    end = begin + run.latency_s
    time.sleep(0.5)
    ended.set()
    watcher.join()
    inside = [w for t, w in watts if begin <= t <= end]
    joules = joules_per_token([run]) * run.generated_tokens
    witness("energy J, against nvidia-smi", joules, statistics.fmean(inside) * run.latency_s, 0.1)


def test_float8_keeps_its_biases():
    """Quanto's own CUDA kernel for float8 drops them; the script's choice of kernel must not."""
    patch_quanto()
    torch.manual_seed(0)
    linear = torch.nn.Linear(2048, 256, dtype=torch.bfloat16, device="cuda:0")
    linear.bias.data.normal_(0, 3)
    quantized = QLinear.from_module(linear, weights=qfloat8)
    quantized.freeze()
    x = torch.randn(1, 5, 2048, dtype=torch.bfloat16, device="cuda:0")
    with torch.no_grad():
        wanted = x.double() @ linear.weight.double().t() + linear.bias.double()
        error = (quantized(x).double() - wanted).norm() / wanted.norm()
    witness("float8 with bias: 1 + relative error", 1 + error.item(), 1, 0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", PRECISIONS)
def test_a_layer_to_compile_is_quantos(weights, dtype, device="cuda:0"):
    """One token through each kind of layer at Qwen2.5-3B's longest sum, and at an awkward count of rows."""
    patch_quanto()
    for rows in (2048, 136 if weights == "int4" else 131):  # TinyGemm knows multiples of 8 alone
        torch.manual_seed(0)
        linear = torch.nn.Linear(11008, rows, dtype=dtype, device=device)
        if weights != "none":
            kinds = {"float8": qfloat8, "int8": qint8, "int4": qint4, "int2": qint2}
            linear = QLinear.from_module(linear, weights=kinds[weights])
            linear.freeze()
        weight = linear.weight.dequantize() if weights != "none" else linear.weight
        x = torch.randn(1, 1, 11008, dtype=dtype, device=device)
        with torch.no_grad():
            wanted = x.double() @ weight.double().t() + linear.bias.double()
            found = dequant_linear(linear)(x)
        assert ((found - wanted).norm() / wanted.norm()).item() < 0.01, rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv", "size", "bucket", "last"),
    [(16, 2, 128, 256, 0), (16, 2, 128, 2048, 2047), (9, 3, 64, 1280, 1100), (4, 4, 80, 8192, 5000)],
)
def test_attention_of_one_token(heads, kv, size, bucket, last, dtype, device="cuda:0"):
    """Against torch's own in float64; places after the last one hold what must not be read."""
    torch.manual_seed(0)
    query = torch.randn(1, heads, 1, size, dtype=dtype, device=device) * 10  # Qwen2's scores are large
    key, value = (torch.randn(1, kv, bucket + 16, size, dtype=dtype, device=device) for _ in range(2))
    mask = (torch.arange(bucket, device=device) <= last)[None, None, None]
    key[:, :, last + 1 :], value[:, :, last + 1 :] = torch.nan, torch.nan
    found = flash_decode(query, key, value, mask, size**-0.5)
    known = (t[:, :, : last + 1].double() for t in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(query.double(), *known, enable_gqa=True)
    assert ((found - wanted).norm() / wanted.norm()).item() < 0.01


def logits_of(model, prompt, count, forced=None, **options):
    """The logits of a greedy answer, shape [tokens, vocabulary]; of the tokens that are forced, if any."""
    kept = []

    def keep(ids, scores):
        kept.append(scores[0].clone())
        if forced:
            scores = torch.full_like(scores, -torch.inf)
            scores[0, forced[len(kept) - 1]] = 0
        return scores

    options |= {"max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), logits_processor=[keep], **options)
    return torch.stack(kept)


@pytest.mark.parametrize("weights", PRECISIONS)
def test_compiled_logits_are_quantos(tiny, weights):
    """On CUDA the step has kernels of its own and is replayed from CUDA graphs, one for each bucket."""
    torch._dynamo.reset()
    s = settings(model_name=tiny, weights=None if weights == "none" else weights, compile=True)
    model = load_model(s, tiny, make_meta_model(s, tiny), GPU)
    prompt, count = torch.arange(40, 50, device="cuda:0")[None], 280 if weights == "int8" else 40
    eager = logits_of(model, prompt, count)
    compiled = prepare_compiled_decode(model, 300)
    graphs = graphs_compiled()
    found = logits_of(model, prompt, count, eager.argmax(-1).tolist(), **compiled.options)
    top = eager.topk(2).values
    clear = top[:, 0] - top[:, 1] > 0.03 * top[:, 0].abs()  # several times the rounding of bfloat16
    error = ((found - eager).norm() / eager.norm()).item()
    print(f"| compiled {weights}: 1 + relative error of the logits | {1 + error:.4f} | 1 | |", flush=True)
    assert compiled.way == SCRIPT_STEP and compiled.graphs == 4 and graphs_compiled() == graphs
    assert 0 < compiled.replay_s(40) < 0.1
    assert clear.any() and (found.argmax(-1) == eager.argmax(-1))[clear].all() and error < 0.02
    # the next step is under way when an end token is found: it leaves no trace
    whole = {"max_new_tokens": 30, "pad_token_id": 0, "do_sample": False} | compiled.options
    answer = model.generate(prompt, eos_token_id=None, **whole)
    ended = model.generate(prompt, eos_token_id=answer[0, 17].item(), **whole)
    assert torch.equal(ended, answer[:, : ended.shape[1]]) and ended.shape[1] <= 18
    assert torch.equal(model.generate(prompt, eos_token_id=None, **whole), answer)


def run_script(env=None, **flags):
    """The script as a process on the GPU."""
    known = {"random_weights": True, "runs": 1} | ({} if "compare" in flags else {"max_length": 64})
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments(known | flags)],
        capture_output=True, encoding="utf-8", env=os.environ | (env or {}), check=False, timeout=300,
    )  # fmt: skip


def test_the_handle_under_cuda_visible_devices():
    """A GPU named by UUID is cuda:0 to torch whatever its number is to NVML."""
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    done = run_script({"CUDA_VISIBLE_DEVICES": uuid})
    assert done.returncode == 0 and "cuda:0 used by all" in done.stdout, done.stderr


def test_without_nvml(tmp_path):
    """NVML's library cannot be loaded: a note, no line of what only NVML knows, and all the rest."""
    (tmp_path / "libnvidia-ml.so.1").touch()
    done = run_script({"LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"})
    shown = done.stdout + done.stderr
    assert done.returncode == 0 and "no NVML: " in shown and "Traceback" not in shown, shown
    assert (
        "cuda:0 allocated" in done.stdout and "used by all" not in done.stdout and "joules" not in done.stdout
    )


def test_no_compiler_is_needed():
    """Without nvcc and ninja on the PATH every precision runs: nothing is built."""
    path = os.pathsep.join(
        p for p in os.environ["PATH"].split(os.pathsep) if "cuda" not in p and "venv" not in p
    )
    done = run_script(
        {"PATH": path, "CUDA_HOME": "/nowhere"}, compare=("float8", "int4", "int2"), compare_tokens=8
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_out_of_memory_at_load():
    """Most of the card taken: one line that says so, no traceback."""
    free, _ = torch.cuda.mem_get_info("cuda:0")
    taken = torch.empty(int(free - 2.0e9), dtype=torch.uint8, device="cuda:0")
    done = run_script(device="cuda:0")
    del taken
    torch.cuda.empty_cache()
    print(done.stderr[-600:], flush=True)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 1 and "out of memory while loading" in done.stdout + done.stderr


def test_out_of_memory_in_a_run(tmp_path):
    """A cache that outgrows what the process may take: the weights and 0.15 GB."""
    size = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 64, "num_hidden_layers": 4}
    config = transformers.Qwen2Config(**size, intermediate_size=256, vocab_size=1000, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    limit = (2.25e9 + 0.15e9) / torch.cuda.mem_get_info("cuda:0")[1]
    limited = {"PYTORCH_CUDA_ALLOC_CONF": f"per_process_memory_fraction:{limit:.4f}"}
    done = run_script(limited, model_name=tmp_path, weights="none", max_length=20000)
    print(done.stdout[-300:], done.stderr[-600:], flush=True)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 1 and "out of memory while running the model" in done.stdout + done.stderr


def test_ctrl_c_during_a_run():
    flags = arguments({"random_weights": True, "max_length": 200, "runs": 5})
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    for line in process.stderr:
        if re.search("^run 1 of 5", line):
            break
    time.sleep(3)
    process.send_signal(2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "### Memory" in out and "Traceback" not in out + err
