"""Results to JSON and back."""

import json
import os
import re

import pytest
from results import BENCHMARKS, piped, quality, result, settings

import qwquanto
from _qwquanto import __version__, results
from _qwquanto.channel import Failure
from _qwquanto.results import (
    SCHEMA,
    Benchmark,
    Passage,
    Result,
    ResultsFile,
    from_json,
    to_json,
    write_results,
)


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_saved_results_are_the_results(kind):
    benchmark = BENCHMARKS[kind]
    again = from_json(to_json(benchmark))
    assert again == benchmark
    assert piped(again) == piped(benchmark)


def test_saved_results_are_written_whole_and_readable(tmp_path):
    file = tmp_path / "x.json"
    write_results(str(file), BENCHMARKS["single"])
    plain = json.loads(file.read_text(encoding="utf-8"))
    assert [plain["schema"], plain["version"], plain["interrupted"]] == [SCHEMA, __version__, False]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", plain["date"])
    assert plain["results"][0]["settings"]["runs"] == 5 and len(plain["results"][0]["runs"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", "{}", "\0", '{"schema": []}', '{"schema": 2}', '{"schema": 2, "results": [{}]}'),
        *('{"schema": 2, "results": [3]}', '{"schema": 2, "results": [{"settings": {}}]}'),
    ],
)
def test_a_file_of_something_else_is_no_results(text):
    with pytest.raises(Failure, match="holds no results"):
        from_json(text)


@pytest.mark.parametrize(
    ("schema", "reader"), [(1, "qwquanto 2.0.0"), (3, "the version that wrote it"), ("x", "the version")]
)
def test_another_schema_is_told_with_the_version_that_reads_it(schema, reader):
    other = json.loads(to_json(BENCHMARKS["single"])) | {"schema": schema}
    with pytest.raises(Failure, match=f"schema {schema}, which {reader}.* reads; this one reads 2"):
        from_json(json.dumps(other))


def test_fields_of_a_later_version_are_left_out_and_those_with_a_default_may_lack():
    """So that a new field need not raise SCHEMA: in every part of a file."""
    kept = BENCHMARKS["compiled comparison"]
    plain = json.loads(to_json(kept)) | {"new": {"a": 1}}
    for r in plain["results"]:
        for part in (r, r["settings"], *r["runs"], r["compiled"] or {}, r["quality"] or {}):
            part["of_2030"] = [1, 2]
        assert r.pop("notes") == [] and r.pop("skipped_layers") == 0
    assert from_json(json.dumps(plain)) == kept


def benchmark(**fields):
    return Benchmark([Result(settings(), **fields)])


def test_results_go_where_a_link_points(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    write_results(str(tmp_path / "link.json"), benchmark())
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "target.json").read_text().startswith("{")


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(str(path), benchmark(load_s=1.5))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_results(str(path), benchmark(load_s=2.5))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    (found,) = from_json(path.read_text(encoding="utf-8")).results
    assert found.load_s == 1.5 and found.settings.model_name == qwquanto.MODEL_NAME


def test_a_question_in_another_encoding_is_written_all_the_same(tmp_path):
    write_results(str(tmp_path / "r.json"), Benchmark([Result(settings(question="caf\udce9"))]))
    assert from_json((tmp_path / "r.json").read_text(encoding="utf-8")).results[0].settings.question == "caf?"


def test_a_later_write_makes_up_for_one_that_failed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    file = ResultsFile(str(tmp_path / "r.json"), Benchmark([]))
    with monkeypatch.context() as patched:
        patched.setattr(results, "write_results", full)
        file.save(result("none"))
        assert file.problems == [f"cannot write {tmp_path / 'r.json'}: No space left on device"]
    file.save(result("int8", complete=False))
    file.save(result("int8"))
    (none, int8) = from_json((tmp_path / "r.json").read_text(encoding="utf-8")).results
    assert file.problems == [] and (none.name, int8.name, int8.complete) == ("none", "int8", True)


def test_no_file_is_written_for_standard_output_or_before_there_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "write_results", lambda *_: pytest.fail("a file was written"))
    for path in (None, "-"):
        ResultsFile(path, Benchmark([])).save(result())
    ResultsFile(str(tmp_path / "r.json"), Benchmark([])).save()


def test_a_file_keeps_every_position():
    r = result("int8", quality=quality(0.004), passages=[Passage([1, 2], [3], 0)])
    assert from_json(to_json(Benchmark([r]))).results == [r]
    assert len(json.loads(to_json(Benchmark([r])))["results"][0]["quality"]["kl_positions"]) == 16
