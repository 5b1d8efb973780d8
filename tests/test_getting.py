"""What a checkpoint is told to be before anything of it is loaded, random weights, and a full disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwquanto import (
    Failure,
    check_architecture,
    check_quantization,
    check_weight_files,
    load_tokenizer,
    random_state,
    read_config,
    reference_file,
)


def failure(call, *arguments):
    """The line of the Failure that this call ends with, or None."""
    try:
        call(*arguments)
    except Failure as raised:
        return str(raised)
    return None


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
        ("of_2030", "Of2030ForCausalLM", "does not know"),
        ("", None, "names no model_type"),
    ],
)
def test_what_a_model_is(kind, architecture, line):
    config = {"model_type": kind, "architectures": architecture and [architecture]}
    said = failure(check_architecture, "them/it", config, False)
    assert (line is None and said is None) or (line in said and str(kind) in said)
    assert said is None or architecture is None or architecture in said


def test_a_model_with_code_of_its_own():
    config = {"model_type": "theirs", "auto_map": {"AutoModelForCausalLM": "m.M"}}
    assert "--trust-remote-code" in failure(check_architecture, "them/it", config, False)
    assert failure(check_architecture, "them/it", config, True) is None
    assert failure(check_architecture, "them/it", config | {"model_type": "qwen2"}, False) is None


@pytest.mark.parametrize(
    ("stored", "named", "missing"),
    [
        ({"quant_method": "gptq", "bits": 4}, "(gptq, 4 bits)", "pip install gptqmodel optimum"),
        ({"quant_method": "awq", "bits": 4}, "(awq, 4 bits)", "pip install gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "(bitsandbytes, 8 bits)", "pip install"),
        ({"quant_method": "compressed-tensors"}, "(compressed-tensors)", "pip install compressed-tensors"),
        ({"quant_method": "of_2030"}, "(of_2030)", "take the unquantized model"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "(fp8)", None),
    ],
)  # fmt: skip
def test_checkpoints_that_are_already_quantized(tmp_path, stored, named, missing):
    for config in ({"quantization_config": stored}, {"text_config": {"quantization_config": stored}}):
        said = failure(check_quantization, "them/it", str(tmp_path), config, "int8", "cpu")
        assert f"them/it is already quantized {named}: " in said
        assert "--weights none" in said
        said = failure(check_quantization, "them/it", str(tmp_path), config, None, "cpu")
        assert (missing is None and said is None) or (named in said and missing in said)


def test_checkpoints_that_quanto_saved(tmp_path):
    (tmp_path / "quanto_qmap.json").write_text("{}")
    for weights in ("int8", None):
        said = failure(check_quantization, "them/it", str(tmp_path), {}, weights, "cpu")
        assert (
            said == "them/it was saved by Quanto, which transformers cannot load: take the unquantized model"
        )


def test_an_unquantized_checkpoint_is_fine(tiny):
    assert check_quantization("tiny", tiny, read_config(tiny), "int8", "cpu") is False
    check_architecture("tiny", read_config(tiny), False)
    check_weight_files(tiny)
    assert load_tokenizer("tiny", tiny, False)("How").input_ids


def test_damage_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / "tokenizer.json").write_text("{")
    assert failure(load_tokenizer, "it", folder, False).startswith("it has no usable tokenizer: ")
    (folder / "tokenizer.json").unlink()
    assert failure(load_tokenizer, "it", folder, False).startswith("it has no tokenizer (")
    (folder / "config.json").write_text("{")
    assert "config.json is missing or damaged" in failure(read_config, folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert "model.safetensors is missing or damaged" in failure(check_weight_files, folder)
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in failure(check_weight_files, folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        shard = name.replace(".", "-00001-of-00001.")
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        assert f"{shard} is missing or damaged" in failure(check_weight_files, folder)
        (folder / f"{name}.index.json").unlink()


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
