"""Getting a model's files, and whether they can be measured at all. huggingface_hub and transformers."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import transformers
from tqdm.auto import tqdm
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.quantizers import AutoHfQuantizer

from _qwquanto.channel import Failure, first_line, log, status
from _qwquanto.settings import Settings

SMALL_FILES = r"[^/]+\.(json|txt|model|tiktoken|jinja|py|spm|vocab|bpe)"  # that from_pretrained reads


def progress_bars(title: str, total: int, plain_lines: bool) -> type[tqdm]:
    """Bars for huggingface_hub that draw nothing and tell the program how much of `total` bytes is here.

    It has one for bytes received, one for bytes written and one for files: the one ahead is told. They are
    called from threads, `display` under tqdm's lock. A total of 0 keeps them silent.
    """
    form = "{n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left"
    pause_s = 30 if plain_lines else 0.3
    begin = told_at = time.monotonic()
    told = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            every_update = {"mininterval": 0, "miniters": 1}
            super().__init__(*args, **options | every_update | {"file": io.StringIO(), "disable": False})

        def display(self, *_: Any, **__: Any) -> None:
            nonlocal told, told_at
            now = time.monotonic()
            here = min(total, self.n)
            if self.unit != "B" or here <= told or now - told_at < pause_s:
                return
            told, told_at = here, now
            meter = tqdm.format_meter(told, total, now - begin, unit="B", unit_scale=True, bar_format=form)
            log(f"{title}: {meter}") if plain_lines else status(f"{title}: {meter}", told / total)

    return Bar


def download_model(model_name: str, random_weights: bool, plain_lines: bool) -> str | None:
    """The local folder of the model's files, downloaded if need be; None for the built-in configuration.

    Where the Hub fails, a model with complete weights in the cache is taken as it is, though other files may
    be missing. Raises Failure.
    """
    if random_weights and model_name == "Qwen/Qwen2.5-3B":
        return None
    if Path(model_name).expanduser().is_dir():
        return str(Path(model_name).expanduser())
    try:
        return download_files(model_name, not random_weights, plain_lines)
    except Failure:
        raise
    except Exception as error:  # the Hub's client raises its own, the operating system's and httpx's
        config = huggingface_hub.try_to_load_from_cache(model_name, "config.json")
        why = first_line(error)
        folder = os.path.dirname(config) if isinstance(config, str) else None
        if folder and (random_weights or weight_names(folder, os.listdir(folder))):
            log(f"{model_name}: taken as it is cached here ({why})")
            return folder
        reason = (
            f"cannot get {model_name} from the Hub, and it is neither a folder nor complete in the cache "
            f"({why}). What to try: the same once more (complete files are kept), a mirror "
            "(set HF_ENDPOINT=https://…), "
            "a local folder (--model-name ./folder), or no download (--random-weights with Qwen/Qwen2.5-3B)"
        )
        if isinstance(error, huggingface_hub.errors.GatedRepoError):  # before the next, which it is too
            reason = f"{model_name} is gated: accept its terms on its page, then: hf auth login"
        elif isinstance(error, huggingface_hub.errors.RepositoryNotFoundError):
            reason = f"the Hub knows no model {model_name} (or it is private: hf auth login)"
        raise Failure(reason) from error


def download_files(model_name: str, with_weights: bool, plain_lines: bool) -> str:
    """The latest snapshot's folder; says how far it is. Raises Failure, or what huggingface_hub raises."""
    info = huggingface_hub.HfApi().model_info(model_name, timeout=10)
    title = f"getting {model_name}"
    files = [file.rfilename for file in info.siblings or ()]
    get = functools.partial(huggingface_hub.snapshot_download, model_name)
    silent = progress_bars(title, 0, plain_lines)
    small = [name for name in files if re.fullmatch(SMALL_FILES, name)]
    folder = get(allow_patterns=small, tqdm_class=silent)
    if not with_weights:
        return folder
    if not (names := weight_names(folder, files)):
        raise Failure(f"{model_name} holds no weights for transformers: of GGUF or PEFT, take the base model")
    # not all that this commit's folder lacks: files that did not change are cached with an earlier one
    planned = get(allow_patterns=names, tqdm_class=silent, dry_run=True)
    total = sum(file.file_size or 0 for file in planned if file.will_download)
    if total:
        log(f"{title}: {tqdm.format_sizeof(total)}B of weights")
    return get(allow_patterns=names, tqdm_class=progress_bars(title, total, plain_lines))


def weight_names(folder: str, files: Iterable[str]) -> list[str]:
    """The `files` that from_pretrained reads weights from, by `folder`'s index; none if one is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if name in files:
            return [name]
        if f"{name}.index.json" in files:
            index = json.loads(Path(folder, f"{name}.index.json").read_text(encoding="utf-8"))
            shards = set(index["weight_map"].values())
            return sorted(shards) if shards <= set(files) else []
    return []


def check_architecture(name: str, config: transformers.PreTrainedConfig) -> None:
    """Raises Failure for what AutoModelForCausalLM cannot load, or loads without what was trained."""
    kind = config.model_type
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return
    # a bare …Model may be fine, with its output tied to its input: loading tells
    headed = [a for a in config.architectures or () if not a.endswith("Model")]
    causal = any(a in classes.values() or "CausalLM" in a or "LMHead" in a for a in headed)
    if kind in classes and (causal or not headed):
        return
    seeing = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    what = "a vision-language model" if seeing else "no causal language model"
    named = ", ".join(config.architectures or ["its architecture is not named"])
    raise Failure(f"{name} is a {kind} model ({named}), {what}: take one for text, as Qwen2.5 and Llama are")


def check_quantization(s: Settings, folder: str, config: transformers.PreTrainedConfig, device: str) -> bool:
    """Whether a checkpoint is already quantized. Raises Failure if it cannot run as the settings want it."""
    stored = getattr(config, "quantization_config", None)
    stored = stored or getattr(config.get_text_config(), "quantization_config", None)
    method = stored.get("quant_method") if stored else None
    if method == "quanto" or Path(folder, "quanto_qmap.json").exists():
        saved = f"{s.model_name} was saved by Quanto"
        raise Failure(f"{saved}, which transformers cannot load: take the unquantized model")
    if not stored:
        return False
    reason = "Quanto cannot do it again; run it as stored with --weights none, or take the unquantized model"
    if not s.weights:
        try:
            quantizer = AutoHfQuantizer.from_config(dict(stored), pre_quantized=True)
            quantizer.validate_environment(device_map={"": device})
            return True
        except Exception as error:  # a package or a GPU that is missing, in transformers' own words
            reason = " ".join(str(error).split())
            if "optimum.gptq" in reason:  # where the words are Python's
                reason = "to run it, pip install gptqmodel optimum"
    raise Failure(f"{s.model_name} is already quantized ({method}): {reason}")


def check_checkpoint(s: Settings, folder: str, device: str) -> int | None:
    """Bytes of a checkpoint that is quantized, else None. Raises Failure for what cannot be measured."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=s.trust_remote_code)
    check_architecture(s.model_name, config)
    if s.random_weights:
        return None
    quantized = check_quantization(s, folder, config, device)
    files = [Path(folder, name) for name in weight_names(folder, os.listdir(folder))]
    if not files:
        raise Failure(f"{folder} lacks model.safetensors or a shard of it: download it again")
    for file in files:
        try:
            if file.suffix == ".safetensors":
                safetensors.safe_open(file, "pt")  # reads the header; the error does not name the file
        except safetensors.SafetensorError as error:
            raise Failure(f"{file} is damaged ({first_line(error)}): download it again") from error
    return sum(file.stat().st_size for file in files) if quantized else None


def load_tokenizer(name: str, folder: str, trust_remote_code: bool) -> Any:
    """Raises Failure, also without its files: of most models transformers 5 makes an empty one in silence."""
    files = r"tokenizer\.json|tekken\.json|vocab.*|tokenizer\.model.*|.*\.(model|tiktoken|spm|bpe)"
    if not any(re.fullmatch(files, path.name) for path in Path(folder).iterdir()):
        raise Failure(f"{name} has no tokenizer (tokenizer.json, tokenizer.model …): take a complete model")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise Failure(f"{name} has no usable tokenizer: {' '.join(str(error).split())}") from error


def token_ids(s: Settings, tokenizer: Any, text: str) -> Any:
    """A prompt's token ids, shape [1, tokens]; under CHAT as a user's turn. Raises Failure."""
    if not s.chat:
        return tokenizer(text, return_tensors="pt").input_ids
    if not getattr(tokenizer, "chat_template", None):
        raise Failure(f"{s.model_name} has no chat template: it is no chat model; leave --chat out")
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], **options).input_ids
