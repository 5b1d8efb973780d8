"""The chart's bounding boxes: nothing overlaps, nothing is cut, every label that must be there is."""

import functools
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from conftest import ROOT, SCRIPT
from matplotlib import font_manager
from matplotlib.colors import to_rgba
from results import (
    BENCHMARKS,
    GIB,
    comparison,
    compiled,
    compiled_comparison,
    files,
    gpu_comparison,
    quality,
    result,
    run,
    settings,
)

from _qwquanto import chart, sheet
from _qwquanto.fit import peak_bytes
from _qwquanto.report import print_report
from _qwquanto.results import Benchmark, Result, from_json, to_json, write_results
from _qwquanto.saved import show
from _qwquanto.settings import PRECISIONS
from _qwquanto.stats import answer_quality, decode_rate
from _qwquanto.text import format_3g, gib

pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from font")

LONG = "an-organisation-with-a-long-name/a-model-with-a-name-that-nobody-would-type-twice-" + "x" * 120


def named(results, **changes):
    """The same results with other settings."""
    return [replace(r, settings=replace(r.settings, **changes)) for r in results]


def chinese():
    question = "如何计算矩阵的行列式？请用中文一步一步地详细解释，并且举一个三阶矩阵的例子。" * 4
    name = "/models/通义千问二点五-三十亿参数-指令微调版"
    command = f"python qwquanto.py --model-name '{name}' --compare --question '{question}'"
    return [
        Benchmark(named(made, model_name=name), command=command)
        for made in (comparison(), compiled_comparison())
    ]


def extremes():
    """Speeds and divergences of all sizes, whiskers as long as their bars, and figures that are unknown."""
    compared = {"compare": PRECISIONS}
    return Benchmark(
        [
            result("none", (900, 1800, 2700), **compared),
            result(
                "int8", (0.011, 0.012), 0.0, memory_bytes_per_s={}, bandwidth_utilization=None, **compared
            ),
            result("float8", (1500,), 1e-9, stored=10**6, memory={}, **compared),
            result("int4", (100, 900), kl=19.5, bandwidth_utilization=0.001, **compared),
            result("int2", (5.0, 5.01), quality=quality(0.45, None), stored=None, **compared),
        ]
    )


def undecided():
    """Verdicts between two words at the limits; a compiled step that answers otherwise, or did not end."""
    made = compiled_comparison()
    made[1] = replace(made[1], quality=quality(0.05, 0.01))
    made[1].compiled = replace(made[1].compiled, quality=quality(0.7))
    made[3] = replace(made[3], quality=quality(0.499, 0.2), complete=False, compiled=None)
    made[4] = replace(
        made[4], quality=quality(0.4999), complete=False, compiled=None, failure="no compiler " * 9
    )
    return Benchmark(made)


def machines():
    """Three files of two machines, with names too long for a line."""
    gpu = named(gpu_comparison(), model_name=LONG)
    for r in gpu:
        r.environment = {"cpu": "AMD EPYC 9V84 96-Core Processor, 40 threads, AVX512", "ram": "314.6 GiB"}
        r.environment |= {"cuda:0": "NVIDIA H100 80GB HBM3, 79.1 GiB", "driver": "580.159.04"}
    return [Benchmark(gpu), BENCHMARKS["interrupted"], BENCHMARKS["random weights"]]


TYPED = f"python qwquanto.py --model-name {LONG} --compare none int8 float8 int4 int2 --compile --runs 3"
LOST = Benchmark([Result(settings(model_name=LONG), failure="no such model: " + "why? " * 99)])
STALLED = Benchmark([result(rates=(10,), complete=False, compiled=None, settings=settings(compile=True))])
CHARTS = {kind: ([f"{kind}.json"], [benchmark]) for kind, benchmark in BENCHMARKS.items()} | {
    "files": (["before", "after"], files()[1]),
    "chinese files": (["之前的结果", "之后的结果"], chinese()),
    "machines": ([LONG, "interrupted", "random"], machines()),
    "long names": ([""], [Benchmark(named(compiled_comparison(), model_name=LONG), command=TYPED)]),
    "extremes": ([""], [extremes()]),
    "undecided": ([""], [undecided()]),
    "lost": ([""], [LOST]),
    "stalled": ([""], [STALLED]),
    "no quality": ([""], [Benchmark([replace(r, quality=None, is_reference=False) for r in comparison()])]),
}


@pytest.fixture(scope="module", params=CHARTS)
def drawn(request):
    """A kind's Figure, and its texts with the room that each takes."""
    figure = chart.draw(*CHARTS[request.param])
    return figure, [(text.get_text(), extent(figure, text)) for text in texts(figure)]


def texts(figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


def extent(figure, text):
    """Left, bottom, right and top of a text in pixels; Chinese, which may lack a font, as squares."""
    shown = text.get_text()
    text.set_text("".join(c for c in shown if c < "\u2e80"))
    box = text.get_window_extent()
    more = (len(shown) - len(text.get_text())) * text.get_fontsize() * sheet.DPI / 72
    text.set_text(shown)
    before = {"left": 0, "center": more / 2, "right": more}[text.get_ha()]
    return box.x0 - before, box.y0, box.x1 + more - before, box.y1


def test_no_two_texts_overlap(drawn):
    _, boxes = drawn
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 1 or b[3] <= a[1] + 1
        assert apart, f"{one!r} overlaps {other!r}"


def test_nothing_is_cut_by_the_edge(drawn):
    figure, boxes = drawn
    wide, high = figure.get_size_inches() * figure.dpi
    assert wide == 800
    for text, (left, bottom, right, top) in boxes:
        inside = left >= 20 and bottom >= 8 and right <= wide - 20 and top <= high - 8
        assert inside, f"{text!r} at {left:.0f} to {right:.0f}"
    for drawing in (*figure.axes[0].patches, *figure.axes[0].lines):
        box = drawing.get_window_extent()
        assert box.x0 >= 20 and box.x1 <= wide - 20 and box.y0 > 0 and box.y1 < high


def test_no_mark_or_limit_strikes_a_text(drawn):
    figure, boxes = drawn
    upright = [line.get_window_extent() for line in figure.axes[0].lines if len(set(line.get_xdata())) == 1]
    upright = [line for line in upright if line.height > sheet.SMALL - 1]
    assert upright
    for (text, (left, bottom, right, top)), line in itertools.product(boxes, upright):
        struck = left < line.x0 < right and bottom < line.y1 and top > line.y0
        assert not struck, f"{text!r} is struck"


def test_every_text_is_large_enough_for_a_phone(drawn):
    sizes = [text.get_fontsize() * sheet.DPI / 72 for text in texts(drawn[0])]
    assert min(sizes) * 390 / 800 > 8


def lines_of(figure):
    return "\n".join(text.get_text() for text in texts(figure))


@functools.cache
def words(kind):
    """The lines of a kind's chart."""
    return lines_of(chart.draw(*CHARTS[kind]))


@pytest.mark.parametrize("kind", CHARTS)
def test_every_precision_has_its_row_in_every_panel_with_its_figures(kind):
    names, benchmarks = CHARTS[kind]
    shown = Counter(words(kind).split("\n"))
    results = [r for b in benchmarks for r in b.results]
    panels = 3 if any(r.quality for r in results) else 2
    for label, count in Counter(map(chart.label, results)).items():
        assert shown[label] >= panels * count
    assert shown["Speed"] == shown["Memory"] == 1 and shown["Answers"] == panels - 2
    for r in results:
        assert shown[format_3g(decode_rate(r.runs))] or not r.runs
        assert shown[gib(r.weight_bytes)] or not r.weight_bytes
        assert any(text.endswith(gib(peak_bytes(r)[0])) for text in shown) or not r.weight_bytes
        assert r.quality is None or (shown[answer_quality(r)] and shown[format_3g(r.quality.kl_divergence)])
        assert not (r.compiled and r.compiled.runs) or shown[format_3g(decode_rate(r.compiled.runs))]
    if len(names) > 1:
        assert all(shown[name] == panels for name in names if name != LONG)


def test_words_tell_what_is_missing():
    assert "float8 ✗\nfailed: its process was killed by SIGKILL (out of memory?)\n" in words("comparison")
    assert "! interrupted, this is what had been measured" in words("interrupted")
    assert "int8 …" in words("interrupted") and "not finished" in words("interrupted")
    assert "! random weights: the answers mean nothing" in words("random weights")
    assert "! random: random weights" in words("machines") and "! interrupted: interrupted" in words(
        "machines"
    )
    assert (
        "The answers were not judged." in words("no quality")
        and "KL" not in words("no quality").split("Whisk")[0]
    )
    assert "compiled not finished" in words("stalled")
    assert "failed: no such model: why?" in words("lost")
    absent = replace(comparison()[2], unavailable=True, failure="needs a newer GPU")
    assert "unavailable: needs a newer GPU" in lines_of(
        chart.draw([""], [Benchmark([comparison()[0], absent])])
    )


def test_machine_model_versions_and_command_stand_below():
    before, after = files()[1]
    after = replace(after, command="python qwquanto.py --compare \n --compile")
    drawn = chart.draw(["before", "after"], [before, after])
    below = lines_of(drawn).split("Whiskers")[1].replace("\n", " ")
    assert "before: Qwen/Qwen2.5-3B, measured on 2026-11-25 by qwquanto" in below
    assert "Some CPU; 8 GiB torch 2.13.0" in below and "torch 2.14.0" in below
    assert below.endswith("torch 2.14.0 python qwquanto.py --compare --compile")
    assert words("machines").startswith("an-organisation") and "NVIDIA H100 80GB HBM3" in words("machines")


def test_colours_say_what_became_of_the_answers():
    reference, kept, failed, changed, broken = comparison()
    shown = [chart.colour(r) for r in (reference, kept, failed, changed, broken)]
    assert shown == [
        chart.REFERENCE,
        chart.COLOURS["kept"],
        chart.UNFINISHED,
        *list(chart.COLOURS.values())[1:],
    ]
    assert chart.colour(result()) == chart.NOT_JUDGED
    unsure = result(quality=quality(0.05, 0.01))
    assert answer_quality(unsure) == "kept or changed" and chart.colour(unsure) == chart.COLOURS["changed"]
    otherwise = result(kl=0.004, compiled=compiled(20, 21, quality=quality(0.7)))
    bars = chart.speed_row(replace(otherwise, settings=settings(compile=True))).bars
    assert [bar.colour for bar in bars] == [chart.COLOURS["kept"], chart.COLOURS["broken"]]
    floor = replace(reference, compiled=compiled(20, 21, quality=quality(0.0002)))
    assert chart.colour(floor, compiled=True) == chart.REFERENCE


def test_a_track_ends_where_the_memory_does():
    r = result(rates=(9.0, 10.0, 11.0), bandwidth_utilization=0.25)
    row = chart.speed_row(r)
    assert (row.bars[0].value, row.bars[0].track, row.column) == (10.0, 40.0, "40.0")
    assert row.bars[0].spread == pytest.approx(1.0)
    assert (chart.memory_row(r).bars[0].value, chart.memory_row(r).bars[0].track) == (1.0, 3.0)
    assert "→ 40.0" in lines_of(chart.draw([""], [Benchmark([r])]))  # 4 times what was measured is too far
    near = replace(r, bandwidth_utilization=0.5)
    assert "20.0" in lines_of(chart.draw([""], [Benchmark([near])])).split("\n")


def test_speeds_are_of_the_tokens_that_all_rows_reached_and_limits_of_whole_runs():
    """As in the report: decode slows as the context grows, so that a short row would look faster."""
    slowing = [run(tokens=80, inter_token_s=[0.1] * 39 + [0.3] * 40, decode_tokens_per_s=79 / 15.9)] * 2
    made = Benchmark([result(runs=slowing, bandwidth_utilization=0.25), result("int4", (9.0, 9.0))])
    shown = lines_of(chart.draw([""], [made])).split("\n")
    assert "10.0" in shown and format_3g(79 / 15.9) not in shown
    assert format_3g(79 / 15.9 / 0.25) in shown


def test_lengths_are_to_scale():
    made = [result(rates=(30, 30)), result("int4", (10, 10), stored=GIB // 4)]
    bars = chart.draw([""], [Benchmark(made)]).axes[0].patches
    fast, slow, large, small = (b.get_width() for b in bars if b.get_facecolor() == to_rgba(chart.NOT_JUDGED))
    assert fast / slow == pytest.approx(3) and large / small == pytest.approx(4)


# ------------------------------------------------------------------------------------------------------ files


def test_an_svg_has_its_text_as_text_and_is_opaque_and_the_same_each_time(tmp_path):
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        assert chart.save_chart(*CHARTS["chinese files"], str(path)) == []
    text = paths[0].read_text(encoding="utf-8")
    assert "通义千问" in text and ">float8 ✗</text>" in text and "fill: #ffffff" in text
    assert re.search(r"font-family: 'DejaVu Sans', 'Verdana'", text) and text == paths[1].read_text("utf-8")


def test_a_png_warns_of_letters_that_no_font_has_and_takes_a_font_that_has(tmp_path, monkeypatch, capsys):
    fonts = font_manager.fontManager
    monkeypatch.setattr(fonts, "ttflist", [font for font in fonts.ttflist if font.name == "DejaVu Sans"])
    chinese = Benchmark(named([result()], model_name="模型", compare=[]))

    def warning(benchmark, name):
        assert chart.save_chart([""], [benchmark], str(tmp_path / name)) == []
        return capsys.readouterr().err

    told = "qwquanto: no font on this machine has 型模: take a .svg, or install a font (Noto Sans CJK)\n"
    assert warning(chinese, "x.png") == told and warning(chinese, "x.svg") == ""
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert warning(BENCHMARKS["single"], "x.png") == ""
    fonts.addfont(font_with("模型", tmp_path / "squares.ttf"))
    assert warning(chinese, "x.png") == ""


def font_with(characters, path):
    """A font that draws these characters as squares."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for step, point in zip("mlll", ((0, 0), (0, 900), (900, 900), (900, 0)), strict=True):
        pen.moveTo(point) if step == "m" else pen.lineTo(point)
    pen.closePath()
    made, glyphs = FontBuilder(1000), [".notdef", *(f"u{ord(c)}" for c in characters)]
    made.setupGlyphOrder(glyphs)
    made.setupCharacterMap({ord(c): f"u{ord(c)}" for c in characters})
    made.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    made.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    made.setupHorizontalHeader(ascent=900, descent=-100)
    made.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    made.setupOS2(usWeightClass=400)
    made.setupPost()
    made.save(path)
    return str(path)


def test_a_users_own_settings_of_matplotlib_are_left_alone_and_out(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"text.color": "white", "text.usetex": True, "svg.fonttype": "path"}):
        chart.save_chart([""], [BENCHMARKS["single"]], str(tmp_path / "x.svg"))
        assert matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["svg.fonttype"] == "path"
    assert ">Speed</text>" in (tmp_path / "x.svg").read_text(encoding="utf-8")


def test_a_result_of_which_nothing_is_known_has_a_chart():
    bare = Result(settings(), complete=True)
    assert "int8\n–\n" in lines_of(chart.draw([""], [Benchmark([bare])]))


def test_the_report_and_saved_files_are_drawn_with_the_command_that_measured_them(tmp_path, capsys):
    made = replace(BENCHMARKS["compiled comparison"], command="python qwquanto.py --compare --compile")
    assert from_json(to_json(made)) == made
    assert print_report(settings(chart=str(tmp_path / "a.svg")), made) == []
    for file in ("x.json", "y.json"):
        write_results(str(tmp_path / file), made)
    one, other = (str(tmp_path / file) for file in ("x.json", "y.json"))
    assert show([one], None, str(tmp_path / "b.svg")) == 0
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert ">python qwquanto.py --compare --compile</text>" in text
    assert (tmp_path / "b.svg").read_text(encoding="utf-8") == text
    assert show([one, other], None, str(tmp_path / "c.svg")) == 0
    both = (tmp_path / "c.svg").read_text(encoding="utf-8")
    assert both.count(">x</text>") == both.count(">y</text>") == 3
    capsys.readouterr()
    lost = str(tmp_path / "gone" / "x.svg")
    assert show([one], None, lost) == 1
    assert capsys.readouterr().err == f"qwquanto: cannot write {lost}: No such file or directory\n"
    assert print_report(settings(chart=lost), made) == [f"cannot write {lost}: No such file or directory"]


def start(folder, *argv):
    """The script as a process that finds the modules of this folder first."""
    env = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    return subprocess.run(command, env=env, capture_output=True, encoding="utf-8", check=False)


def test_a_chart_that_cannot_be_made_is_told_of_before_anything_is_loaded(tmp_path):
    write_results(str(tmp_path / "x.json"), BENCHMARKS["single"])
    wrong = "CHART must be a file that can be written, and ends in .svg or .png, not "
    for path in (tmp_path / "x.pdf", tmp_path / "none" / "x.svg", tmp_path):
        for argv in ((), ("--show", tmp_path / "x.json")):
            done = start(tmp_path, *argv, "--chart", path)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr == f"qwquanto: {wrong}{str(path)!r}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    write_results(str(tmp_path / "x.json"), BENCHMARKS["single"])
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    told = "qwquanto: CHART is drawn by matplotlib, which this Python lacks: pip install matplotlib\n"
    for argv in ((), ("--show", tmp_path / "x.json")):
        done = start(tmp_path, *argv, "--chart", tmp_path / "x.svg")
        assert (done.returncode, done.stdout, done.stderr) == (2, "", told)
    shown = start(tmp_path, "--show", tmp_path / "x.json")
    assert (shown.returncode, shown.stderr) == (0, "") and "### Speed" in shown.stdout


def test_a_chart_by_the_script_itself(tmp_path):
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    for file in files:
        write_results(str(file), BENCHMARKS["comparison"])
    done = start(tmp_path, "--show", *files, "--chart", tmp_path / "x.png")
    assert (done.returncode, done.stderr) == (0, "") and "| after int8" in done.stdout
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_program_that_draws_nothing_does_not_import_matplotlib():
    code = "import sys, qwquanto, _qwquanto.saved; qwquanto.main(['--runs', '0'])"
    code += "; sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"qwquanto: RUNS must be a whole number from 1 on, not 0\n")
