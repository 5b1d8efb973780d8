"""Getting a model from a Hub on the loopback address, and what a checkpoint is told to be."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hub
import pytest
import torch
from conftest import make_model
from models import load
from results import settings
from safetensors.torch import save_file

from _qwquanto.channel import CHANNEL, Failure, describe_error
from _qwquanto.worker import checkpoint
from _qwquanto.worker.checkpoint import check_checkpoint, load_tokenizer, progress_bars
from _qwquanto.worker.generation import Bench
from _qwquanto.worker.loading import weight_stats


def test_sharded_and_damaged_checkpoints(tmp_path):
    folder = make_model(tmp_path, steps=0, max_shard_size="300KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    check_checkpoint(settings(), folder, "cpu")
    assert weight_stats(load(folder, "int8"), ["cpu"])["quantized_layers"] == 14
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    with pytest.raises(Failure, match=f"{shards[1].name} is damaged"):
        check_checkpoint(settings(), folder, "cpu")
    shards[1].unlink()
    with pytest.raises(Failure, match="or a shard of it: download it again"):
        check_checkpoint(settings(), folder, "cpu")


# One process gets several models: huggingface_hub reads its environment at import, which takes seconds.
CODE = """import json, sys
from _qwquanto.channel import Failure
from _qwquanto.worker import checkpoint
checkpoint.log = lambda text: print('log:', text, file=sys.stderr, flush=True)
def status(text, fraction=None):
    done = "" if fraction is None else f" [{fraction:.2f}]"
    print(f"status: {text}{done}", file=sys.stderr, flush=True)
checkpoint.status = status
for name in sys.argv[1:]:
    model, _, random = name.partition("?")
    try:
        print(json.dumps(checkpoint.download_model(model, bool(random), False)), flush=True)
    except Failure as failure:
        print(json.dumps(f"FAILURE {failure}"), flush=True)
"""
MODEL, LARGE = "them/model", "them/large"
LAST = "model-00002-of-00002.safetensors"
UNNEEDED = {
    "pytorch_model.bin",
    "optimizer.bin",
    "training_args.bin",
    "consolidated.safetensors",
    "README.md",
}
NOBODY = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Repositories as they are: shards, a second format, optimizer states, the authors' format, folders."""
    root = tmp_path_factory.mktemp("repositories")

    def make(name, files):
        for file in files:
            path = root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            index = json.dumps(
                {"weight_map": {n: n for n in files if n.endswith((".safetensors", ".bin")) and "-of-" in n}}
            )
            path.write_text(index if file.endswith(".index.json") else file * 100)
        return root / name

    common = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "qwen.tiktoken",
        "chat_template.jinja",
    }
    common |= {
        "optimizer.bin",
        "training_args.bin",
        "README.md",
        "onnx/config.json",
        "original/consolidated.00.pth",
    }
    bins = {
        "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    }
    safe = {"model.safetensors.index.json", "model-00001-of-00002.safetensors", LAST}
    folders = {
        MODEL: make("model", common | safe | {"pytorch_model.bin", "consolidated.safetensors"}),
        "them/both": make(
            "both", common | {"model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"}
        ),
        "them/pickled": make("pickled", common | {"pytorch_model.bin", "adapter_model.safetensors"}),
        "them/sharded": make("sharded", common | bins),
        "them/gated": make("gated", common | safe),
        "them/gguf": make("gguf", {"README.md", "model.Q4_0.gguf"}),
        "them/adapter": make("adapter", {"adapter_config.json", "adapter_model.safetensors"}),
        LARGE: make("large", common),
    }
    folders["them/random"] = folders[MODEL]
    with open(folders[LARGE] / "model.safetensors", "wb") as file:
        file.truncate(60_000_000)  # huggingface_hub reads 10 MiB at a time
    return folders


def start(home, url, *names, **more):
    """A process that gets these models from this Hub alone."""
    keys = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    keys |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CODE, *names], env=os.environ | keys | more, **pipes)


def get(*arguments, **more):
    """For each model its folder or the failure's line; and standard error."""
    process = start(*arguments, **more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()], err


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def weights(folder):
    return {name for name in names(folder) if name.endswith((".safetensors", ".bin"))}


def test_the_files_that_are_needed_and_what_the_hub_says_no_to(models, tmp_path):
    asked = [MODEL, "them/both", "them/pickled", "them/sharded", "them/random?random"]
    refused = ["them/gated", "nobody/nothing", "them/gguf", "them/adapter"]
    with hub.serve(models, gated={"them/gated"}) as here:
        (folder, both, pickled, sharded, random, *failures), err = get(tmp_path, here.url, *asked, *refused)
    assert names(folder) == names(models[MODEL]) - UNNEEDED - {"original", "onnx"}
    assert {"qwen.tiktoken", "chat_template.jinja"} <= names(folder)
    assert weights(both) == {"model.safetensors"}
    assert weights(pickled) == {"pytorch_model.bin"}
    assert weights(sharded) == {"pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"}
    assert "config.json" in names(random)
    assert not weights(random)
    no_weights = "holds no weights for transformers: of GGUF or PEFT, take the base model"
    assert failures == [
        "FAILURE them/gated is gated: accept its terms on its page, then: hf auth login",
        "FAILURE the Hub knows no model nobody/nothing (or it is private: hf auth login)",
        f"FAILURE them/gguf {no_weights}",
        f"FAILURE them/adapter {no_weights}",
    ]
    assert "log: getting them/both: 1.70kB of weights\n" in err


def test_what_is_cached_is_enough_without_the_hub(models, tmp_path):
    """Nothing is asked for again, and no file is missed that from_pretrained might not need."""
    asked = [MODEL, "them/pickled"]
    with hub.serve(models) as here:
        folders, _ = get(tmp_path, here.url, *asked, *asked)
    assert folders[:2] == folders[2:]
    assert len(here.downloads) == len(set(here.downloads))
    for folder in folders[:2]:
        (Path(folder) / "qwen.tiktoken").unlink()
    (Path(folders[1]) / "pytorch_model.bin").unlink()  # what is left of it is no model
    for url, more in ((NOBODY, {}), (here.url, {"HF_HUB_OFFLINE": "1"})):
        (folder, nothing), err = get(tmp_path, url, *asked, **more)
        assert folder == folders[0]
        assert f"log: {MODEL}: taken as it is cached here (" in err
        assert nothing.startswith("FAILURE cannot get them/pickled from the Hub")
        assert all(way in nothing for way in ("HF_ENDPOINT", "--model-name ./folder", "--random-weights"))


def test_a_slow_file_shows_how_far_it_is(models, tmp_path):
    with hub.serve(models, rates={"model.safetensors": 2e7}) as here:
        _, err = get(tmp_path, here.url, LARGE)
    shown = re.findall(
        r"^status: getting them/large: ([\d.]+)MB of 60.0MB, ([\d.]+)MB/s, ([\d:]+) left \[(.*)\]$", err, re.M
    )
    done, rates, rests, fractions = zip(*shown, strict=True)
    assert len(set(done)) >= 4
    assert list(map(float, fractions)) == sorted(map(float, fractions))
    assert all(abs(float(d) / 60 - float(f)) < 0.01 for d, f in zip(done, fractions, strict=True))
    assert max(map(float, rates)) <= 60  # 20, and the first 10 MiB may come at once
    assert len(set(rests)) > 1


def test_a_new_commit_with_the_same_weights_gets_what_is_new(models, tmp_path):
    """And says nothing of weights that are here."""
    with hub.serve(models) as here:
        (before,), err = get(tmp_path, here.url, MODEL)
    assert "log: getting them/model: " in err
    with hub.serve(models, commit="f" * 40) as again:
        (after,), err = get(tmp_path, again.url, MODEL)
    assert Path(after).name == "f" * 40 != Path(before).name
    assert weights(after) == weights(before) and "getting" not in err
    assert again.downloads == []


def test_a_download_that_is_killed_keeps_complete_files(models, tmp_path):
    with hub.serve(models, rates={LAST: 10}) as here:
        process = start(tmp_path, here.url, MODEL)
        kept = tmp_path / "hub/models--them--model/snapshots" / hub.COMMIT
        wanted = names(models[MODEL]) - UNNEEDED - {"original", "onnx"}
        try:
            deadline = time.monotonic() + 120
            while not (kept.is_dir() and names(kept) == wanted - {LAST}):
                assert process.poll() is None, here.downloads
                assert time.monotonic() < deadline, here.downloads
                time.sleep(0.1)
        finally:
            process.kill()
            process.communicate()
    with hub.serve(models) as again:
        (folder,), _ = get(tmp_path, again.url, MODEL)
    assert names(folder) == wanted
    assert again.downloads == [f"{MODEL}/{LAST}"]


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
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(CHANNEL, "send", lambda **message: said.append(message))
    kind = progress_bars("getting it", 100, plain_lines)
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
    silent = progress_bars("getting it", 0, plain_lines)(unit="B")
    now[0] += 60
    silent.update(5)
    assert len(said) == len(shown)
