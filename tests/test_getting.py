"""What a checkpoint is told to be before anything of it is loaded, random weights, and a full disk."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from results import settings
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import qwquanto
from _qwquanto.channel import describe_error
from _qwquanto.worker.checkpoint import check_checkpoint, load_tokenizer
from _qwquanto.worker.generation import Bench
from _qwquanto.worker.loading import random_state
from _qwquanto.worker.quality import reference_file


def failure(call, *arguments):
    """The line that the user reads if this call fails, or None."""
    try:
        call(*arguments)
    except Exception as error:
        return describe_error(error, Bench(settings()))[0]
    return None


def check(folder, config=None, **constants):
    """The line about a checkpoint with this config.json, or None if it can be loaded."""
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    s = settings(**{"model_name": "them/it", "weights": "int8"} | constants)
    return failure(check_checkpoint, s, str(folder), "cpu")


@pytest.mark.parametrize(
    ("kind", "architecture", "line"),
    [
        ("qwen2", "Qwen2ForCausalLM", None),
        ("gpt2", "GPT2LMHeadModel", None),
        ("llama", "LLaMAForCausalLM", None),  # as early conversions spelt it
        ("mistral", "MistralModel", None),  # loading tells whether its output is tied
        ("gemma3", "Gemma3ForConditionalGeneration", None),  # AutoModelForCausalLM takes it
        ("t5", "T5ForConditionalGeneration", "no causal language model"),
        ("bert", "BertForMaskedLM", "no causal language model"),
        ("llama", "LlamaForSequenceClassification", "no causal language model"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "a vision-language model"),
    ],
)
def test_what_a_model_is(tmp_path, kind, architecture, line):
    said = check(tmp_path, {"model_type": kind, "architectures": [architecture]})
    expected = (
        f"them/it is a {kind} model ({architecture}), {line}: take one for text, as Qwen2.5 and Llama are"
    )
    assert said == (line and expected)


def test_what_transformers_does_not_know(tmp_path):
    unknown = check(tmp_path, {"model_type": "of_2030", "architectures": ["Of2030ForCausalLM"]})
    assert "this transformers does not know the model's architecture" in unknown
    assert "should have a `model_type` key" in check(tmp_path, {}).lower()
    assert "config.json' is not a valid JSON file" in check(tmp_path, "{")


def test_a_model_with_code_of_its_own(tmp_path):
    config = {"model_type": "theirs", "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}}
    assert "--trust-remote-code" in check(tmp_path, config)
    config_code = "import transformers\nclass C(transformers.PreTrainedConfig):\n    model_type = 'theirs'\n"
    (tmp_path / "m.py").write_text(config_code)
    assert check(tmp_path, config, trust_remote_code=True) is None
    assert check(tmp_path, config | {"model_type": "qwen2"}) is None


@pytest.mark.parametrize(
    ("stored", "missing"),
    [
        ({"quant_method": "gptq", "bits": 4}, "pip install gptqmodel optimum"),
        ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "pip install -U bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "pip install compressed-tensors"),
        ({"quant_method": "of_2030"}, "Unknown quantization type"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, None),
    ],
)
def test_checkpoints_that_are_already_quantized(tmp_path, stored, missing):
    named = f"them/it is already quantized ({stored['quant_method']}): "
    for config in (
        {"model_type": "qwen2", "quantization_config": stored},
        {"model_type": "gemma3", "text_config": {"quantization_config": stored}},
    ):
        said = check(tmp_path, config)
        assert said.startswith(named) and "--weights none" in said
        said = check(tmp_path, config, weights=None)
        assert (missing is None and said is None) or (said.startswith(named) and missing in said)


def test_checkpoints_that_quanto_saved(tmp_path):
    expected = "them/it was saved by Quanto, which transformers cannot load: take the unquantized model"
    in_config = {"model_type": "qwen2", "quantization_config": {"quant_method": "quanto", "weights": "int8"}}
    assert check(tmp_path, in_config) == check(tmp_path, in_config, weights=None) == expected
    (tmp_path / "quanto_qmap.json").write_text("{}")
    assert check(tmp_path, {"model_type": "qwen2"}) == expected


def test_an_unquantized_checkpoint_is_fine(tiny):
    assert check_checkpoint(settings(), tiny, "cpu") is None
    assert load_tokenizer("tiny", tiny, False)("How").input_ids


def test_a_checkpoint_that_runs_as_stored_has_the_size_of_its_files(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    size = (folder / "model.safetensors").stat().st_size
    assert check_checkpoint(settings(weights=None), str(folder), "cpu") == size


def test_damage_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / "tokenizer.json").write_text("{")
    assert failure(load_tokenizer, "it", folder, False).startswith("it has no usable tokenizer: ")
    (folder / "tokenizer.json").unlink()
    assert failure(load_tokenizer, "it", folder, False).startswith("it has no tokenizer (")
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert check(folder).startswith(f"{folder}/model.safetensors is damaged (")
    (folder / "model.safetensors").unlink()
    assert "lacks model.safetensors or a shard of it" in check(folder)


@pytest.mark.parametrize("plain_lines", [True, False])
def test_a_download_is_told_by_the_bar_ahead_now_and_then(monkeypatch, plain_lines):
    """Every 30 s where lines stay, else three times a second; never backwards, never of a count of files."""
    now, said = [100.0], []
    monkeypatch.setattr(qwquanto.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(qwquanto, "send", lambda **message: said.append(message))
    kind = qwquanto.progress_bars("getting it", 100, plain_lines)
    received, written, files = kind(unit="B", total=0), kind(unit="B", total=0), kind(unit="it", total=2)
    for seconds, bar, count in (
        (1, received, 10), (29, received, 20), (0, written, 30), (1, written, 10), (30, received, 20),
        (30, files, 1), (30, written, 70),
    ):  # fmt: skip
        now[0] += seconds
        bar.update(count)
    shown = [re.match(r"getting it: (.*B) of 100B", m.get("log") or m["status"])[1] for m in said]
    assert (
        shown == ["30.0B", "50.0B", "100B"] if plain_lines else ["10.0B", "30.0B", "40.0B", "50.0B", "100B"]
    )
    assert all(("log" in message) == plain_lines for message in said)
    silent = qwquanto.progress_bars("getting it", 0, plain_lines)(unit="B")
    now[0] += 60
    silent.update(5)
    assert len(said) == len(shown)


@pytest.mark.parametrize("tie", [True, False])
def test_random_weights(tiny, tie):
    config = AutoConfig.from_pretrained(tiny, tie_word_embeddings=tie)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = random_state(empty)
    options = {"config": config, "state_dict": state, "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    model, told = type(empty).from_pretrained(None, **options, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    stored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(stored) == len(list(model.parameters())), (
        "parameters share memory: their bytes are counted once"
    )
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(
        weight, type(empty).from_pretrained(None, **options).model.layers[0].mlp.up_proj.weight
    )
    assert (model.model.norm.weight == 1).all()
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_reference_rows(tmp_path):
    rows = torch.randn(3, 1000)
    with reference_file(tmp_path, "wb") as file:
        for row in rows:
            file.write(row.numpy())
    with reference_file(tmp_path, "rb") as file:
        for row in rows:
            assert torch.equal(torch.frombuffer(bytearray(file.read(4000)), dtype=torch.float32), row)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "logprobs.f32").symlink_to("/dev/full")

    def write():
        with reference_file(tmp_path, "wb") as file:
            for _ in range(10):
                file.write(torch.zeros(100_000).numpy())

    said = failure(write)
    assert said.startswith(
        f"cannot keep the reference answer in {tmp_path} (No space left on device): set TMPDIR"
    )
