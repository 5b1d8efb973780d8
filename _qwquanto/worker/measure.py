"""The order of one measurement: set up, load, run, prefill, quality, compiled. Imports all of the worker."""

from __future__ import annotations

import math
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

from _qwquanto.channel import Failure, describe_error, log, save, step
from _qwquanto.compiled.prepare import graphs_compiled, max_positions, prepare_compiled_decode
from _qwquanto.results import Compiled, Result
from _qwquanto.settings import Settings
from _qwquanto.worker.checkpoint import check_checkpoint, download_model, load_tokenizer, token_ids
from _qwquanto.worker.devices import (
    choose_devices,
    describe_environment,
    gpu_memory_in_use,
    memory_bandwidth,
    memory_of,
    nvml_handles,
    peak_memory,
    snapshot,
    synchronize,
)
from _qwquanto.worker.generation import (
    TORCH_COMPILE_S,
    Bench,
    cudnn_attention,
    generation_options,
    measure_prefill,
    profile_a_step,
    timed_runs,
    try_torch_compile,
    warmup_runs,
)
from _qwquanto.worker.loading import (
    decode_weight_bytes,
    load_model,
    make_meta_model,
    place_model,
    weight_stats,
)
from _qwquanto.worker.quality import measure_quality, plan_quality
from _qwquanto.worker.quanto import leave_out_cudnn_attention, quanto_defects

GENERATION = (  # the settings of generate() that the report names
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "eos_token_id",
)  # fmt: skip


def tokenize(s: Settings, tokenizer: Any, config: transformers.PreTrainedConfig) -> torch.Tensor:
    """The question's token ids, shape [1, tokens]; random ones with random weights. Raises Failure."""
    longest = max_positions(config)
    if tokenizer is None:
        torch.manual_seed(s.seed)
        ids = torch.randint(10, config.get_text_config().vocab_size - 10, (1, 16))
    else:
        ids = token_ids(s, tokenizer, s.question)
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
    result.ends_comparison = True
    with step("looking for a device"):
        # on a CPU nothing starts CUDA, whose libraries would count as the process's memory
        in_use = gpu_memory_in_use() if s.device != "cpu" else {}
        bench.devices, notes = choose_devices(s.device)
        result.devices = bench.devices
        result.notes = notes
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
        bench.plans = plan_quality(s, bench.tokenizer, max_positions(meta_model.config))
        result.ends_comparison = False
        bench.devices, bench.advice = place_model(s, bench.devices, meta_model, stored)
        bench.handles, notes = nvml_handles(bench.devices)
        result.devices = bench.devices
        result.notes = result.notes + notes
        result.environment = describe_environment(bench.devices, bench.handles)
        result.memory["at start"] = {f"{d} used": in_use[d] for d in bench.devices if d in in_use}
        result.device_memory_bytes = {d: memory_of(d)[1] for d in bench.devices}
        longest = max_positions(meta_model.config)
        result.max_positions = int(longest) if longest < math.inf else None
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
    with step("preparing the runs"):
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
    judged = max((len(plan.prompt) + plan.places for plan in bench.plans), default=0)
    longest = max(bench.prompt.shape[1] + bench.new_tokens, judged)
    log(f"compiling the decode step for up to {longest} tokens: this takes half a minute or so")
    with step("compiling the decode step"):
        begin = time.perf_counter()
        bench.compiled = prepare_compiled_decode(bench.model, longest)
        seconds = time.perf_counter() - begin
        made = bench.compiled
        result.compiled = Compiled(made.way, seconds, made.graphs)
        save(result)
    with step("running the compiled model"):
        result.compiled.warmup, graphs = warmup_runs(bench), graphs_compiled()
        if made.replay_s:  # after the warm-up, in the middle of a run
            result.compiled.step_s = made.replay_s(bench.prompt.shape[1] + bench.new_tokens // 2)
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
            result.kv_bytes_per_token = bench.kv_bytes_per_token
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
        result.complete = True
    except Exception as error:  # whatever it is becomes the Result's failure
        if debug:
            traceback.print_exc()
        result.failure, result.unavailable = describe_error(error, bench.advice)
    save(result)
