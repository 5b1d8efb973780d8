"""Which way a model is compiled, and making it ready for generate()."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from _qwquanto.channel import Failure
from _qwquanto.compiled.layers import INDUCTOR_OPTIONS, merge_layers, swap_layers
from _qwquanto.compiled.step import DecodeStep


def max_positions(config: transformers.PreTrainedConfig) -> float:
    """The longest sequence that a model takes, whatever its configuration calls it; infinite if unnamed."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "model_max_length")
    return next((getattr(text, name) for name in names if getattr(text, name, None)), math.inf)


NOT_COMPILED, LEAVE_OUT = "transformers does not compile this model", "leave --compile out"
SCRIPT_STEP = "this script's compiled decode step"
STATIC_CACHE = "compiled with transformers' static cache"


@dataclass
class CompiledDecode:
    """A model whose decode step is compiled: `way` is SCRIPT_STEP or STATIC_CACHE, `graphs` Dynamo's."""

    way: str
    graphs: int
    options: dict[str, Any]  # what generate() needs besides its own
    replay_s: Callable[[int], float] | None = None  # DecodeStep's, where CUDA graphs are replayed


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


def guard_generate(model: Any, cache: StaticCache, max_tokens: int) -> None:
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
    guard_generate(model, cache, max_tokens)
    options = {"past_key_values": cache, "compile_config": transformers.CompileConfig()}
    options["compile_config"]._compile_all_devices = True  # generation/utils.py, _valid_auto_compile_criteria
    ids = torch.full((1, 4), 2, device=model.device)
    model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    if graphs_compiled() == before:
        raise Failure(f"torch.compile compiled nothing of this model: {LEAVE_OUT}")
    if step and not step.agrees():  # a difference between two layers that `region_key` does not see
        raise Failure(f"compiled, this model answers otherwise: {LEAVE_OUT}")
    way, replay_s = SCRIPT_STEP if step else STATIC_CACHE, None
    if step and model.device.type == "cuda":
        step.capture_graphs()
        replay_s = step.replay_s
    return CompiledDecode(way, graphs_compiled() - before, options, replay_s)


def compile_decode(model: Any, max_tokens: int) -> dict[str, Any]:
    """For your own program: compile a loaded model's decode, and have the options that generate() then needs.

        options = qwquanto.compile_decode(model, max_tokens=512)
        ids = model.generate(ids, max_new_tokens=200, **options)

    The model may be quantized by Quanto or not; bf16, fp16 or fp32; on the CPU or one GPU. Once a model; see
    `prepare_compiled_decode`.
    """
    return prepare_compiled_decode(model, max_tokens).options
