"""Place and load a model, real or with random weights; its bytes and layers. torch and transformers."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, QuantoConfig
from transformers.modeling_utils import get_state_dict_dtype, load_state_dict

from _qwquanto.channel import Failure, log
from _qwquanto.settings import BITS, PRECISIONS, Settings
from _qwquanto.text import format_3g, gib
from _qwquanto.worker.checkpoint import weight_names
from _qwquanto.worker.devices import memory_of
from _qwquanto.worker.quanto import linear_layers, linear_subclasses, modules_to_skip, patch_quanto

NO_FIT_ADVICE = "ask for fewer tokens, or take a smaller model"
ACTIVATION_SCALES = ("input_scale", "output_scale")  # of a Quanto layer; activations are not quantized here
QWEN2_5_3B = {  # config.json of Qwen/Qwen2.5-3B, so that --random-weights needs no network
    "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "max_window_layers": 36,
    "use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151643, "dtype": "bfloat16",
}  # fmt: skip


def plain_tensors(tensor: Any) -> list:
    """The tensors that hold a tensor's bytes, as `__tensor_flatten__` names them.

    A Quanto weight reports size and dtype of the unquantized one, so that `nbytes`, `element_size` and
    `get_memory_footprint` are all wrong for it.
    """
    tensor = getattr(tensor, "data", tensor)  # a Parameter hides the wrapper's methods
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [p for name in tensor.__tensor_flatten__()[0] for p in plain_tensors(getattr(tensor, name))]


def stored_bytes(tensors: Iterable) -> int:
    """Bytes stored for all of these tensors together, tied ones counted once."""
    plain = [p for tensor in tensors for p in plain_tensors(tensor) if p.numel()]
    return sum({(str(p.device), p.data_ptr()): p.nbytes for p in plain}.values())


def load_peak_bytes(weight_bytes: int, largest_linear: int, weights: str | None) -> int:
    """Bytes of tensors that loading holds at most; what glibc keeps of freed ones comes on top on a CPU."""
    # while a layer is quantized, copies in bfloat16, float32 and int8: measured were 10.4 bytes for each of
    # its numbers (int8 and float8) and 8 (int4 and int2) on a CPU, 9.8 (int8) on CUDA
    return weight_bytes + (10 * largest_linear if weights else 0)


@dataclass
class RandomTensor:
    """A checkpoint's tensor that is made when transformers reads it, `tensor[...]`, of one block repeated.

    It reads one, quantizes it and only then reads the next (core_model_loading.py,
    has_on_the_fly_quantization): the unquantized model is never in memory.
    """

    shape: torch.Size
    dtype: torch.dtype
    block: torch.Tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        flat = torch.empty(self.shape.numel(), dtype=self.dtype)
        for part in flat.split(self.block.numel()):
            part.copy_(self.block[: part.numel()])
        return flat.view(self.shape)


def random_state(model: Any) -> dict[str, Any]:
    """Random weights for a meta model; not for a tied output embedding: from_pretrained would untie it."""
    torch.manual_seed(0)
    block = torch.randn(2**22).mul_(0.02).to(model.dtype)
    state = {}
    tied = model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        if name in tied or not tensor.is_floating_point():
            continue
        if tensor.ndim < 2:
            state[name] = torch.full(tensor.shape, float("norm" in name), dtype=tensor.dtype)
        else:
            state[name] = RandomTensor(tensor.shape, tensor.dtype, block)
    return state


def make_meta_model(s: Settings, folder: str | None) -> Any:
    """The model without memory (on torch's meta device), in the dtype it will be loaded in."""
    if folder is None:
        config = AutoConfig.for_model(**QWEN2_5_3B)
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=s.trust_remote_code)
    if s.random_weights:
        vars(config).pop("quantization_config", None)  # there are no such weights
    elif config.dtype is None:  # the checkpoint's own
        file = Path(folder, weight_names(folder, os.listdir(folder))[0])
        config.dtype = get_state_dict_dtype(load_state_dict(file, map_location="meta"))
    if s.dtype != "auto":
        config.dtype = getattr(torch, s.dtype)
    config.dtype = config.dtype or torch.float32
    options = {"dtype": config.dtype, "trust_remote_code": s.trust_remote_code}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def expected_bytes(model: Any, precision: str) -> int:
    """Bytes that a meta model's weights will take: 8 bits with a scale a row, else two a group of 128."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    total = sum(t.nbytes for t in tensors.values())
    if precision == "none":
        return total
    for weight in (layer.weight for layer in linear_layers(model)):
        scales = weight.shape[0] if BITS[precision] == 8 else 2 * weight.numel() / 128
        total += weight.numel() * BITS[precision] / 8 + scales * model.dtype.itemsize - weight.nbytes
    return int(total)


def place_model(
    s: Settings, devices: list[str], meta_model: Any, stored: int | None
) -> tuple[list[str], str]:
    """(devices, advice for a lack of memory): the first GPU that the model fits, else all. Says what comes.

    `stored`: bytes of a checkpoint that is quantized already, else None; no precision makes it smaller.
    Raises Failure for a model beyond the devices' total memory; one beyond their free memory is tried.
    """
    largest = max((m.weight.numel() for m in linear_layers(meta_model)), default=0)
    needed = stored or expected_bytes(meta_model, s.weights or "none")
    peak = load_peak_bytes(needed, largest, s.weights)
    roomy = next((d for d in devices if max(needed * 1.1, peak) < memory_of(d)[0]), None)
    devices = [roomy] if roomy else devices
    free, total = map(sum, zip(*map(memory_of, devices), strict=True))
    sizes = {} if stored else {p: expected_bytes(meta_model, p) for p in PRECISIONS}
    fits = [f"{p} ({gib(size)} GiB)" for p, size in sizes.items() if size * 1.1 < free and size < needed]
    free_here = f"{gib(free)} GiB free on {', '.join(devices)}"
    advice = f"{free_here}; " + (f"would fit: {', '.join(fits)}" if fits else NO_FIT_ADVICE)
    size = format_3g(sum(p.numel() for p in meta_model.parameters()), 1e9)
    expected = f"{gib(needed)} GiB of weights expected (up to {gib(peak)} while loading)"
    tried = ": tried all the same" if peak > free else ""
    log(f"{s.model_name}, {s.weights or 'as stored'}: {size} B parameters, {expected}, {free_here}{tried}")
    if needed > total:
        raise Failure(f"the weights need {gib(needed)} of {gib(total)} GiB in all; {advice}")
    return devices, advice


def load_model(s: Settings, folder: str | None, meta_model: Any, devices: list[str]) -> Any:
    """The model of `meta_model`, quantized while it loads; spread over all `devices` if there are several.

    Raises Failure for a checkpoint that lacks weights.
    """
    transformers.logging.disable_progress_bar()
    options = {"dtype": meta_model.dtype, "device_map": {"": devices[0]} if len(devices) == 1 else "auto"}
    if s.weights:
        patch_quanto(s.quanto_kernels)
        skipped = modules_to_skip(meta_model)
        options["quantization_config"] = QuantoConfig(weights=s.weights, modules_to_not_convert=skipped)
    if s.random_weights:
        state = random_state(meta_model)
        model = type(meta_model).from_pretrained(None, config=meta_model.config, state_dict=state, **options)
    else:
        options |= {"trust_remote_code": s.trust_remote_code, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
        missing = [key for key in info["missing_keys"] if not key.endswith(ACTIVATION_SCALES)]
        if missing:
            what = f"{len(missing)} weights ({missing[0]}) of a {type(model).__name__}"
            raise Failure(f"the checkpoint lacks {what}: download it again, or take another model")
    if {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())) - {*devices}:
        raise Failure(f"the model does not fit {', '.join(devices)}: parts were left to the CPU or the disk")
    return model.eval()


def weight_stats(model: Any, devices: list[str]) -> dict[str, Any]:
    """The fields of a Result about the weights: bytes, and how many layers Quanto really holds."""
    linear = [layer.weight.data for layer in linear_layers(model)]
    quantized = [weight for weight in linear if hasattr(weight, "_qtype")]
    parameters = list(model.parameters())
    # not Quanto's scales of activations: scalars that no quantized weight uses
    buffers = [b for name, b in model.named_buffers() if not name.endswith(ACTIVATION_SCALES)]
    # a wrapper reports numel and dtype of the unquantized weight: here that is what is wanted
    unquantized = lambda tensors: sum(t.numel() * t.dtype.itemsize for t in tensors)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in parameters),
        "weight_bytes": stored_bytes([*parameters, *buffers]),
        "device_weight_bytes": {
            d: stored_bytes(p for p in parameters if str(p.device) in (d, f"{d}:0")) for d in devices
        },
        "unquantized_bytes": unquantized({id(t): t for t in [*parameters, *buffers]}.values()),
        "quantizable_bytes": unquantized(linear),
        "quantized_layers": len(quantized),
        "linear_layers": len(linear) + hasattr(model.get_output_embeddings(), "weight"),
        "skipped_layers": len(linear_subclasses(model)) if quantized else 0,
        "weight_types": dict(Counter(type(weight).__name__ for weight in quantized)),
    }


def has_experts(model: Any) -> bool:
    """Whether this is a mixture of experts, of which a decode step reads some: by its modules' names, or by a
    weight (a router's, or all experts' in one) with as many rows as the configuration has experts.

    A configuration alone tells nothing: those of dense Doge and Nemotron-H models count experts too.
    """
    if any(re.search("expert|moe", name) for name, _ in model.named_modules()):
        return True
    config = model.config.get_text_config().to_dict()
    inner = [value for value in config.values() if isinstance(value, dict)]  # as DBRX's ffn_config
    counted = r"(num|n)_(local_|routed_)?experts$"
    counts = {v for d in (config, *inner) for k, v in d.items() if re.search(counted, str(k))} - {None, 0, 1}
    return any(p.ndim > 1 and len(p) in counts for p in model.parameters())


def decode_weight_bytes(model: Any) -> int | None:
    """Bytes of weights that one decode step must read: all but an untied input embedding.

    None for a mixture of experts, of which a step reads some.
    """
    if has_experts(model):
        return None
    given, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is None or given.weight.data_ptr() == output.weight.data_ptr()
    return stored_bytes(model.parameters()) - (0 if tied else stored_bytes([given.weight]))
