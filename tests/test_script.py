"""The script as its user runs it: real processes, a tiny model that recites one sentence, every precision and fault."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ANSWER, QUESTION, SCRIPT, arguments, make_model


def no_traceback(ended):
    assert "Traceback" not in ended.err + ended.out
    return ended


def test_one_precision_reports_and_recites(script, tiny):
    ended = no_traceback(
        script(
            model_name=tiny, weights="int8", question=QUESTION, max_length=64, do_sample=False, warmup_runs=1
        )
    )
    assert ended.code == 0, ended.err
    told = ended.results[0]
    assert [run["stop_reason"] for run in told["runs"]] == ["eos", "eos"]
    assert told["runs"][0]["text"] == ANSWER
    assert told["warmup"] and told["failure"] is None
    assert told["quantized_layers"] == 14 and told["weight_types"] == {"WeightQBytesTensor": 14}
    assert told["generation"]["do_sample"] is False
    assert set(told["memory"]) == {"before load", "after load", "peak of load", "peak of runs"}
    assert 0 < told["bandwidth_utilization"] < 1 and told["prefill_tokens"] == 512
    for run in told["runs"]:
        gaps = run["inter_token_s"]
        assert len(gaps) == run["generated_tokens"] - 1
        assert run["decode_tokens_per_s"] == pytest.approx(len(gaps) / sum(gaps))
        assert run["ttft_s"] + sum(gaps) <= run["latency_s"]
    for line in ("### Speed", "### Runs", "### Memory", "Weights: ", "Quantized: 14 of 15", ANSWER):
        assert line in ended.out
    assert (
        "14 of 15" not in ended.err and "parameters" in ended.err
    )  # the report is on one stream, progress on the other


def test_sampling_is_seeded_and_settings_are_the_used_ones(script, tiny):
    texts = []
    for _ in range(2):
        ended = script(
            model_name=tiny, weights="none", question=QUESTION, max_length=40, temperature=5.0, seed=3
        )
        texts.append([run["text"] for run in ended.results[0]["runs"]])
        assert [run["seed"] for run in ended.results[0]["runs"]] == [3, 4]
        assert ended.results[0]["generation"]["top_k"] == 50
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


def test_a_model_that_ends_at_once(script, tmp_path):
    import torch
    from transformers import Qwen2ForCausalLM

    folder = (
        make_model(tmp_path / "ends", steps=0, tie=False) if (tmp_path / "ends").mkdir() is None else None
    )
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.nn.init.zeros_(model.lm_head.weight)  # all logits equal: greedy takes token 0, the end
    model.save_pretrained(folder)
    ended = no_traceback(script(model_name=folder, question=QUESTION, do_sample=False, max_length=40))
    assert ended.code == 0 and all(run["generated_tokens"] == 1 for run in ended.results[0]["runs"])
    assert re.search(r"\| 1 +\| eos +\| +1 \| +[\d.]+ \| +– \|", ended.out)
    assert "a chat model wants --chat" in ended.out


def test_piped_output_is_uncut_utf8_whatever_the_locale(script, tiny):
    chinese = "如何计算矩阵的行列式？"
    for env in ({"LANG": "C", "LC_ALL": "C"}, {"PYTHONIOENCODING": "cp1252"}):
        ended = no_traceback(script(env=env, model_name=tiny, question=chinese, max_length=80, runs=1))
        assert ended.code == 0 and "…" not in ended.out, ended.err
        assert all(line == line.rstrip() for line in ended.out.splitlines())


def test_report_fits_80_columns(tiny, tmp_path):
    """On a terminal of 80 columns no table is wider, and nothing in it is cut."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    flags = arguments(
        {"model_name": tiny, "max_length": 40, "question": QUESTION, "runs": 2, "device": "cpu"}
    )
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *flags], stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown.decode()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) > 15 and max(map(len, lines)) <= 80 and not any("…" in line for line in table)


def test_json_to_standard_output_sends_the_report_to_the_other(script, tiny):
    import json

    ended = script(model_name=tiny, question=QUESTION, max_length=40, runs=1, results="-")
    assert json.loads(ended.out)["results"][0]["runs"][0]["generated_tokens"] > 0
    assert "### Speed" in ended.err


def test_random_weights_do_the_main_job_without_anything(script, tmp_path):
    (tmp_path / "shape").mkdir()
    folder = make_model(tmp_path / "shape", steps=0)
    for file in (tmp_path / "shape").iterdir():
        if file.name != "config.json":
            file.unlink()
    ended = no_traceback(script(model_name=folder, random_weights=True, max_length=40))
    assert ended.code == 0 and "Random weights" in ended.out
    assert ended.results[0]["runs"][0]["prompt_tokens"] == 16 and ended.results[0]["quantized_layers"] == 14


def test_no_network_ends_in_one_readable_message(script, tmp_path):
    ended = no_traceback(script(env={"HF_HOME": str(tmp_path)}))
    assert ended.code == 1 and ended.out == ""
    (line,) = ended.err.strip().splitlines()
    assert line.startswith("qwquanto: cannot get Qwen/Qwen2.5-3B")
    assert all(way in line for way in ("HF_ENDPOINT", "--model-name ./folder", "--random-weights"))


def test_a_truncated_checkpoint_is_named(script, tmp_path):
    folder = make_model(tmp_path, steps=0)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    ended = no_traceback(script(model_name=folder))
    assert ended.code == 1 and "model.safetensors is missing or damaged" in ended.err.splitlines()[-1]


def test_a_question_without_room_and_a_missing_chat_template(script, tiny):
    ended = no_traceback(script(model_name=tiny, question=QUESTION * 20, max_length=20))
    assert ended.code == 1 and "leaves no room" in ended.out
    ended = no_traceback(script(model_name=tiny, chat=True))
    assert ended.code == 1 and "no chat template" in ended.out


def start(tmp_path, **flags):
    """The script in a process group of its own, and the folder its temporary files must be gone from."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    flags = {"device": "cpu", "results": tmp_path / "results.json"} | flags
    return folder, subprocess.Popen(
        [sys.executable, SCRIPT, *arguments(flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        start_new_session=True, env=os.environ | {"TMPDIR": str(folder)},
    )  # fmt: skip


def saved(tmp_path):
    """The results file's content so far."""
    import json

    file = tmp_path / "results.json"
    return json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else []


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


def children(process):
    import psutil

    return [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]


def test_ctrl_c_in_the_second_run_keeps_the_first(tiny, tmp_path):
    _, process = start(
        tmp_path, model_name=tiny, question=QUESTION, runs=50, max_length=400, temperature=50.0
    )
    wait_for(lambda: saved(tmp_path) and saved(tmp_path)[0]["runs"], process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in out + err
    assert "### Runs" in out and "interrupted" in err and re.search(r"^\| 1 ", out, re.MULTILINE)


# ------------------------------------------------------------------------------------------------ comparison

SMALL = {"question": QUESTION, "compare_tokens": 20, "quality_tokens": 40, "runs": 2}


def test_comparison_of_every_precision(script, tiny):
    """int8 keeps the sentence, int2 breaks it: as the quality says, and as the texts show."""
    precisions = ("int2", "int4", "int8", "float8", "none")
    tokens = 70  # the sentence is shorter: its end must not end a run
    ended = no_traceback(script(model_name=tiny, compare=precisions, **(SMALL | {"compare_tokens": tokens})))
    assert ended.code == 0, ended.err
    told = {r["settings"]["weights"] or "none": r for r in ended.results}
    assert list(told) == ["none", "float8", "int8", "int4", "int2"]
    for r in told.values():
        assert [run["generated_tokens"] for run in r["runs"]] == [tokens] * 2 and r["failure"] is None
    assert told["none"]["quality"] is None
    assert told["int8"]["quality"]["kl_divergence"] < 0.05 and told["int8"]["quality"]["same_top_token"] == 1
    assert told["int2"]["quality"]["kl_divergence"] > 0.5
    assert told["int8"]["quality"]["positions"] == told["int2"]["quality"]["positions"] > 20
    assert (
        ANSWER[:30] in told["int8"]["runs"][0]["text"] and ANSWER[:30] not in told["int2"]["runs"][0]["text"]
    )
    assert told["none"]["weight_bytes"] > told["int8"]["weight_bytes"] > told["int2"]["weight_bytes"]
    assert "int2 BREAKS THIS MODEL" in ended.out and "Smallest that keeps the answers" in ended.out
    assert re.search(r"^\| none .*reference", ended.out, re.MULTILINE)


def test_a_killed_child_loses_its_row_only(tiny, tmp_path):
    folder, process = start(
        tmp_path, model_name=tiny, compare=("none", "int8", "int4"), **(SMALL | {"runs": 300})
    )
    wait_for(lambda: len(saved(tmp_path)) == 1 and saved(tmp_path)[0]["runs"], process)
    children(process)[0].kill()
    wait_for(lambda: len(saved(tmp_path)) == 2 and saved(tmp_path)[1]["runs"], process)
    children(process)[0].kill()
    wait_for(lambda: len(saved(tmp_path)) == 3 and saved(tmp_path)[2]["runs"], process)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    none, int8, int4 = saved(tmp_path)
    assert (
        "SIGKILL" in none["failure"]
        and none["runs"]
        and "SIGKILL" in int8["failure"]
        and int4["failure"] is None
    )
    assert process.returncode == 130 and "Traceback" not in out + err
    assert "none FAILED: its process was killed by SIGKILL" in out and re.search(
        r"^\| int4 ", out, re.MULTILINE
    )
    assert not list(folder.glob("qwquanto-*"))


def test_ctrl_c_prints_what_has_finished_and_leaves_nothing(tiny, tmp_path):
    folder, process = start(tmp_path, model_name=tiny, compare=("none", "int8"), **(SMALL | {"runs": 20}))
    wait_for(lambda: len(saved(tmp_path)) == 2 and saved(tmp_path)[1]["runs"], process)
    child = children(process)[0]
    assert list(folder.glob("qwquanto-*/logprobs.npy"))
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in out + err
    assert re.search(r"^\| none .*reference|^\| none ", out, re.MULTILINE)
    assert not child.is_running() and not list(folder.glob("qwquanto-*"))


def edited(tmp_path, *replacements):
    """A copy of the script with other text in it."""
    text = SCRIPT.read_text(encoding="utf-8")
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    copy = tmp_path / "qwquanto.py"
    copy.write_text(text, encoding="utf-8")
    return copy


def test_a_hanging_and_a_raising_precision_are_rows(script, tiny, tmp_path):
    copy = edited(
        tmp_path,
        ("SILENCE_S = 900", "SILENCE_S = 20"),
        (
            "    from transformers import AutoModelForCausalLM, QuantoConfig, logging\n",
            (
                "    from transformers import AutoModelForCausalLM, QuantoConfig, logging\n"
                "    if s.weights == 'int8':\n        time.sleep(3600)\n"
                "    if s.weights == 'int4':\n        raise ValueError('odd weights')\n"
                "    if s.weights == 'int2':\n        raise RuntimeError('No working C++ compiler found')\n"
            ),
        ),
        # as CUDA may after an error of its own: what was said before counts
        (
            "        debug,\n    )\n",
            "        debug,\n    )\n    if s.weights == 'int4':\n        os.abort()\n",
        ),
    )
    small = SMALL | {"runs": 1, "quality_tokens": 0}
    ended = no_traceback(
        script(path=copy, model_name=tiny, compare=("none", "int8", "int4", "int2"), **small)
    )
    assert ended.code == 1
    none, int8, int4, int2 = ended.results
    assert none["failure"] is None and len(none["runs"]) == 1
    assert int8["failure"] == "said nothing for 20 s and was ended"
    assert int4["failure"] == "ValueError while loading the model: odd weights (--debug shows more)"
    assert int2["unavailable"] and int2["failure"].startswith("needs a C++ compiler")
    assert "int8 FAILED" in ended.out and "int2 unavailable: needs a C++ compiler" in ended.out
    ended = no_traceback(script(path=copy, model_name=tiny, compare=("none", "int2"), **small))
    assert ended.code == 0, "an unavailable precision is no failure"
