"""The script as its user runs it: real processes, a tiny model that recites one sentence, every precision."""

import ast
import contextlib
import fcntl
import json
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
import time

import psutil
import pytest
from conftest import ANSWER, QUESTION, ROOT, SCRIPT, arguments, make_model, start, wait_for
from fake_worker import fake_worker, with_worker
from processes import Terminal, check_interrupted, wait_for_end, worker_of


def test_one_precision_reports_and_recites(script, tiny):
    ended = script(
        model_name=tiny, weights="int8", question=QUESTION, max_length=64, do_sample=False, warmup_runs=1
    )
    assert ended.code == 0, ended.err
    (found,) = ended.results
    assert [run["stop_reason"] for run in found["runs"]] == ["eos", "eos"]
    assert found["runs"][0]["text"] == ANSWER
    assert found["warmup"] and found["complete"] and found["failure"] is None
    assert found["quantized_layers"] == 14 and found["weight_types"] == {"WeightQBytesTensor": 14}
    assert found["kernels"] == {"aten::_weight_int8pack_mm": 14, "aten::mm": 1}  # each product once
    assert found["generation"]["do_sample"] is False
    phases = {"at start", "before load", "after load", "peak of load", "peak of runs", "peak of prefill"}
    assert set(found["memory"]) == phases
    rates = [run["decode_tokens_per_s"] for run in found["runs"]]
    reached = found["weight_bytes"] * sum(rates) / 2  # tied embeddings: all weights are read for each token
    assert found["bandwidth_utilization"] * found["memory_bytes_per_s"]["cpu"] == pytest.approx(reached, 0.01)
    assert 0 < found["bandwidth_utilization"] < 1 and found["prefill_tokens"] == 512
    for run in found["runs"]:
        gaps = run["inter_token_s"]
        assert len(gaps) == run["generated_tokens"] - 1
        assert run["decode_tokens_per_s"] == pytest.approx(len(gaps) / sum(gaps))
        assert run["ttft_s"] + sum(gaps) <= run["latency_s"]
    for line in ("### Speed", "### Runs", "### Memory", "Weights: ", "Quantized: 14 of 15", ANSWER):
        assert line in ended.out
    # the report is on one stream, progress on the other
    assert "14 of 15" not in ended.err and "run 2 of 2" in ended.err and "run 2 of 2" not in ended.out


def test_a_model_that_ends_at_once(script, tmp_path):
    import torch
    from transformers import Qwen2ForCausalLM

    (tmp_path / "ends").mkdir()
    folder = make_model(tmp_path / "ends", steps=0, tie=False)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.nn.init.zeros_(model.lm_head.weight)  # all logits equal: greedy takes token 0, the end
    model.save_pretrained(folder)
    ended = script(model_name=folder, question=QUESTION, do_sample=False, max_length=40)
    assert ended.code == 0 and all(run["generated_tokens"] == 1 for run in ended.results[0]["runs"])
    assert re.search(r"\| 1 +\| eos +\| +1 \| +[\d.]+ \| +– \|", ended.out)
    assert "a chat model wants --chat" in ended.out


def test_piped_output_is_uncut_utf8_whatever_the_locale_and_settings_are_the_used_ones(script, tiny):
    chinese = "如何计算矩阵的行列式？"
    env = {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "cp1252"}
    ended = script(env=env, model_name=tiny, question=chinese, max_length=80, temperature=5.0, seed=3)
    assert ended.code == 0 and "…" not in ended.out, ended.err
    assert all(line == line.rstrip() for line in ended.out.splitlines())
    (found,) = ended.results
    assert found["settings"]["question"] == chinese
    assert [run["seed"] for run in found["runs"]] == [3, 4]
    assert found["generation"]["temperature"] == 5.0 and found["generation"]["top_k"] == 50


def test_random_weights_do_the_main_job_without_anything(script, tmp_path):
    (tmp_path / "shape").mkdir()
    folder = make_model(tmp_path / "shape", steps=0)
    for file in (tmp_path / "shape").iterdir():
        if file.name != "config.json":
            file.unlink()
    ended = script(model_name=folder, random_weights=True, max_length=40)
    assert ended.code == 0 and "Random weights" in ended.out
    assert ended.results[0]["runs"][0]["prompt_tokens"] == 16 and ended.results[0]["quantized_layers"] == 14


def test_no_network_ends_in_one_readable_message(script, tmp_path):
    ended = script(env={"HF_HOME": str(tmp_path)})
    assert ended.code == 1 and ended.out == ""
    line = ended.err.strip().splitlines()[-1]
    assert line.startswith("qwquanto: cannot get Qwen/Qwen2.5-3B")
    assert all(way in line for way in ("HF_ENDPOINT", "--model-name ./folder", "--random-weights"))


# ------------------------------------------------------------------------------------------------ comparison


def test_comparison_of_every_precision(script, tiny, tmp_path):
    """int8 keeps the sentence, int2 breaks it: as the quality says, and as the texts show."""
    tokens = 70  # the sentence is shorter: its end must not end a run
    ended = script(
        model_name=tiny, question=QUESTION, compare=("int2", "int4", "int8", "float8", "none"),
        compare_tokens=tokens, quality_tokens=40, chart=tmp_path / "x.svg",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    chart = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert all(f">{text}</text>" in chart for text in ("bf16", "int2", "reference", "kept", "broken"))
    assert ">python qwquanto.py --results" in chart
    found = {r["settings"]["weights"] or "none": r for r in ended.results}
    assert list(found) == ["none", "int8", "float8", "int4", "int2"]
    for r in found.values():
        assert [run["generated_tokens"] for run in r["runs"]] == [tokens] * 2 and r["failure"] is None
    none, int8, int2 = found["none"], found["int8"], found["int2"]
    assert none["quality"] is None and none["is_reference"]
    assert int8["quality"]["kl_divergence"] < 0.05 and int8["quality"]["same_top_token"] > 0.8
    assert int8["quality"]["same_greedy_tokens"] == int8["quality"]["greedy_tokens"] > 20
    assert none["greedy_answer"] == int8["greedy_answer"] != int2["greedy_answer"]
    assert len(none["passages"]) >= 16 and int8["passages"] == []
    assert int2["quality"]["kl_divergence"] > 0.5
    assert int8["quality"]["positions"] == int2["quality"]["positions"] == 32, "16 prompts, equal shares"
    assert ANSWER[:30] in int8["runs"][0]["text"] and ANSWER[:30] not in int2["runs"][0]["text"]
    assert none["weight_bytes"] > int8["weight_bytes"] > int2["weight_bytes"]
    assert "int2: BREAKS THIS MODEL" in ended.out and "Take " in ended.out
    assert re.search(r"^\| bf16 .*reference", ended.out, re.MULTILINE)
    assert not list(script.temporary.glob("qwquanto-*"))


def test_a_comparison_with_the_compiled_step(script, tiny):
    """Its figures stand beside the eager ones and replace none of them."""
    ended = script(
        model_name=tiny,
        question=QUESTION,
        compare=("none", "int8"),
        compile=True,
        compare_tokens=40,
        quality_tokens=40,
        env={"OMP_NUM_THREADS": "2"},
    )
    assert ended.code == 0, ended.err
    none, int8 = ended.results
    assert none["is_reference"] and none["quality"] is None
    assert none["compiled"]["quality"]["kl_divergence"] < 0.01 and int8["quality"]["kl_divergence"] < 0.05
    assert int8["compiled"]["quality"]["kl_divergence"] == pytest.approx(
        int8["quality"]["kl_divergence"], abs=0.01
    )
    for r in ended.results:
        assert len(r["runs"]) == len(r["compiled"]["runs"]) == 2 and r["complete"]
        assert {"peak of runs", "peak of compiled runs"} <= set(r["memory"])
    assert int8["torch_compile_graphs"] == 0 and none["torch_compile_graphs"] is None
    assert "no effect: 0 graphs" in ended.out
    assert "### This script's compiled decode step: median" in ended.out
    assert "KL of the compiled step's answers: int8 " in ended.out and "The floor: KL " in ended.out
    assert int8["compiled"]["quality"]["text_id"] == int8["quality"]["text_id"]


def test_a_comparison_on_a_text_of_the_users(script, tiny, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text(f"{QUESTION}{ANSWER} {QUESTION}{ANSWER}", encoding="utf-8")
    ended = script(
        model_name=tiny, question=QUESTION, compare=("none", "int8"), compare_tokens=8, runs=1,
        quality_text=text, quality_tokens=40,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    none, int8 = ended.results
    assert len(none["passages"][0]["tokens"]) == int8["quality"]["positions"] == 40
    assert 1 < int8["quality"]["reference_perplexity"] < 2 * int8["quality"]["perplexity"]
    assert "40 tokens of mine.txt" in ended.out and "perplexity" in ended.out
    assert "quality is judged on the first 41 of QUALITY_TEXT's" in ended.err
    text.write_text("Short.", encoding="utf-8")
    ended = script(model_name=tiny, compare=("none", "int8"), quality_text=text)
    assert ended.code == 1 and "at least 32 are needed" in ended.err.splitlines()[-1]


@pytest.mark.parametrize("argv", [["--help"], ["--runs", "0"], ["--nonsense"], ["--show", __file__]])
def test_what_needs_no_model_imports_nothing_heavy(argv):
    code = "import sys, runpy; sys.argv = {!r}; sys.path[0] = {!r}"
    code += "\ntry: runpy.run_path(sys.argv[0], run_name='__main__')"
    code += "\nexcept SystemExit as end:"
    code += "\n    print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)), end.code)"
    done = start(code.format([str(SCRIPT), *argv], str(ROOT)), path="-c")
    assert done.stdout.splitlines()[-1] == f"[] {0 if argv == ['--help'] else 2}"
    assert "Traceback" not in done.stderr


def test_inline_metadata_lists_the_requirements():
    """PEP 723, for `uv run qwquanto.py`: the packages of requirements.txt, in the file."""
    source = SCRIPT.read_text(encoding="utf-8")
    lines = re.search(r"(?m)^# /// script\n((?:#(?: .*)?\n)+)# ///$", source).group(1).splitlines()
    listed = re.findall(r'"([^"]+==[^"]+)"', "\n".join(lines))
    assert listed == (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert '# requires-python = ">=3.11"' in lines and ast.get_docstring(ast.parse(source))


PARENT = """import runpy, sys
sys.argv, sys.path[0] = [{path!r}, *{argv!r}], {root!r}
try:
    runpy.run_path({path!r}, run_name="__main__")
except SystemExit as end:
    heavy = {{"torch", "transformers", "numpy", "optimum"}} & set(sys.modules)
    print("parent:", end.code, heavy, file=sys.stderr)
"""


def test_only_a_worker_imports_torch_and_the_parent_stays_small(tiny):
    flags = {"model_name": tiny, "device": "cpu", "question": QUESTION, "max_length": 40, "warmup_runs": 0}
    code = PARENT.format(path=str(SCRIPT), root=str(ROOT), argv=arguments(flags))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    worker, parents, workers = worker_of(process), [], []
    with contextlib.suppress(psutil.Error):
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            parents.append(psutil.Process(process.pid).memory_info().rss)
            workers.append(worker.memory_info().rss)
            time.sleep(0.05)
    _, err = process.communicate(timeout=60)
    assert err.decode().splitlines()[-1] == "parent: 0 set()"
    assert max(parents) < 100e6 < 200e6 < max(workers)


def test_a_reader_that_has_seen_enough_ends_it_quietly(script, tiny):
    """As in `| head -3`, with nobody left when the report comes."""
    read, write = os.pipe()
    process = script.start(
        model_name=tiny, question=QUESTION, max_length=40, runs=1, streams={"stdout": write}
    )
    os.close(write)
    os.close(read)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and b"Error" not in err and b"Traceback" not in err


def test_results_on_a_full_disk(script, tiny):
    """A limit of a file's size stands for a disk that fills up: the file can be made, and not be written."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))

    streams = {"preexec_fn": limit}
    ended = script(model_name=tiny, question=QUESTION, max_length=40, runs=1, streams=streams)
    assert ended.code == 1 and "### Speed" in ended.out
    lines = [line for line in ended.err.splitlines() if line.startswith("qwquanto:")]
    assert lines == [f"qwquanto: cannot write {script.file}: File too large"]
    assert not script.file.exists() and not list(script.file.parent.glob(".results*"))


LONG = {"question": QUESTION, "runs": 300, "temperature": 50.0, "max_length": 400}


def test_ctrl_c_keeps_the_runs_that_were_made(script, tiny):
    terminal = Terminal(script, model_name=tiny, **LONG)
    worker = worker_of(terminal.process)
    wait_for(lambda: script.results and script.results[0]["runs"], terminal.process)
    terminal.press_ctrl_c()
    shown = check_interrupted(terminal, worker.pid)
    assert "### Runs" in shown and re.search(r"^\| 1 ", shown, re.MULTILINE)


def test_a_killed_parent_leaves_no_worker(script, tiny):
    process = script.start(model_name=tiny, **LONG)
    worker = worker_of(process)
    wait_for(lambda: script.results and script.results[0]["runs"], process)
    process.kill()
    process.communicate()
    assert not wait_for_end(worker.pid, 2)


# --------------------------------------------------------------- its ends and its streams, with a fake worker

DONE = "say(log='run 1 of 2: done'); say(result=RESULT)"


@pytest.fixture
def faked(script, tmp_path):
    """Runs the script with a worker that does `acts`, instead of one that measures."""

    def run_it(acts, streams=None, **flags):
        path = with_worker(tmp_path, fake_worker(acts))
        return script.end(script.start(path=path, streams=streams, **flags))

    return run_it


@pytest.mark.parametrize(
    ("unavailable", "compared", "code"),
    [(True, True, 0), (True, False, 1), (False, True, 1), (False, False, 1)],
)
def test_exit_code_of_a_failure(faked, unavailable, compared, code):
    """What this machine lacks is no failure of a comparison."""
    failed = f"UNFINISHED | {{'failure': 'odd', 'unavailable': {unavailable}}}"
    acts = f"say(result=RESULT if weights == 'none' else {failed})"
    ended = faked(acts, **({"compare": ("none", "int8")} if compared else {}))
    assert ended.code == code and "odd" in ended.out


def test_a_package_that_is_missing_is_named(faked):
    ended = faked("import no_such_package")
    (line,) = ended.err.strip().splitlines()[-1:]
    assert ended.code == 1 and ended.out == ""
    assert "No module named 'no_such_package'" in line and line.endswith("pip install -r requirements.txt")


def test_results_on_standard_output_leave_the_report_to_the_other_stream(faked):
    ended = faked(DONE, results="-")
    (found,) = json.loads(ended.out)["results"]
    assert ended.code == 0 and found["complete"] and "### Speed" in ended.err


def closed_pipe():
    """A pipe's end whose other end is closed."""
    read, write = os.pipe()
    os.close(read)
    return write


def test_a_picture_is_saved_though_nobody_reads_the_report(faked, tmp_path):
    ended = faked(DONE, {"stdout": closed_pipe()}, report=tmp_path / "report.svg")
    assert ended.code == 0 and "<svg" in (tmp_path / "report.svg").read_text(encoding="utf-8")


def test_progress_that_nobody_reads_ends_nothing(faked):
    """As in `2>&1 >report | head -1`, and with a log on a full disk."""
    for stream in (closed_pipe(), os.open("/dev/full", os.O_WRONLY)):
        ended = faked(DONE, {"stderr": stream})
        assert ended.code == 0 and "### Runs" in ended.out and ended.results[0]["complete"]


def test_a_report_that_cannot_be_written_is_told(faked):
    ended = faked(DONE, {"stdout": os.open("/dev/full", os.O_WRONLY)})
    assert ended.code == 1 and ended.results[0]["complete"]
    told = "qwquanto: cannot write to standard output: No space left on device"
    assert ended.err.splitlines()[-1] == told


def test_a_report_fits_a_terminal_of_80_columns(script, tmp_path):
    """No table is wider, and nothing in it is cut."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    streams = {"stdin": theirs, "stdout": theirs, "stderr": subprocess.DEVNULL}
    process = script.start(path=with_worker(tmp_path, fake_worker(DONE)), streams=streams)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown.decode()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) > 15 and max(map(len, lines)) <= 80 and not any("…" in line for line in table)
