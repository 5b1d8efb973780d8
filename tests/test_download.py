"""Getting a model: the real download against a Hub on the loopback address."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import hub
import pytest
from conftest import ANSWER, QUESTION

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


def test_a_comparison_asks_the_hub_once(tiny, script, tmp_path):
    """A push between two precisions would compare two revisions. The settings keep the name asked for."""
    with hub.serve({"them/tiny": Path(tiny)}) as here:
        env = {
            "HF_HOME": str(tmp_path),
            "HF_ENDPOINT": here.url,
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        flags = {"compare": ("none", "int8"), "compare_tokens": 40, "quality_tokens": 0, "runs": 1}
        ended = script(env=env, model_name="them/tiny", question=QUESTION, **flags)
    assert ended.code == 0, ended.err
    assert here.asked.count("/api/models/them/tiny") == 1
    assert "them/tiny/model.safetensors" in here.downloads
    for found in ended.results:
        assert ANSWER[:20] in found["runs"][0]["text"]
        assert found["settings"]["model_name"] == "them/tiny" and found["folder"].endswith(hub.COMMIT)
    assert found["folder"] not in ended.out
