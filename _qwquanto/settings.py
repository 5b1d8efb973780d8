"""The constants and flags of a call become checked Settings. Imports the standard library alone."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _qwquanto import __version__

PRECISIONS = ("none", "int8", "float8", "int4", "int2")
# In the order of running: the first that runs is the reference of quality. Another one, which QuantoConfig
# must know, also concerns BITS, `expected_bytes` (worker/loading), patches and defects (worker/quanto),
# `dequant_linear` (compiled/layers), `expectations` (claims), the constants' comments and README.
BITS = {"none": 16, "int8": 8, "float8": 8, "int4": 4, "int2": 2}
SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def rule(holds: Callable[[Any], Any], allowed: str) -> dict[str, Any]:
    """The metadata of a field of Settings: whether a value is possible, and what is, in words."""
    return {"holds": holds, "allowed": allowed}


def is_writable(path: str) -> bool:
    """Whether a file can be written at this path; leaves none behind."""
    try:
        target = Path(path).resolve()
        tempfile.TemporaryFile(dir=target.parent).close()
        return not target.exists() or (target.is_file() and os.access(target, os.W_OK))
    except OSError:
        return False


def is_model(name: str) -> bool:
    """Whether this is a folder with a model, or can be a model's id on the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return (folder / "config.json").is_file()
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name))


def is_text(path: str) -> bool:
    """Whether this is a file with some text in UTF-8."""
    try:
        return bool(Path(path).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return False


def at_least(least: int) -> dict[str, Any]:
    return rule(lambda v: type(v) is int and v >= least, f"a whole number from {least} on")


def above_zero(hint: str = "") -> dict[str, Any]:
    return rule(lambda v: type(v) is not bool and 0 < v < math.inf, "a number above 0" + hint)


YES_OR_NO = rule(lambda v: type(v) is bool, "True or False")
DTYPES = ("auto", *SHORT_DTYPES)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A snapshot of the constants: one field each, in lower case, with its rule for `check`.

    A field that is added from now on has a default, so that older files stay readable.
    """

    model_name: str = field(
        metadata=rule(is_model, "a Hub id like Qwen/Qwen2.5-3B or a folder with a config.json")
    )
    weights: str | None = field(
        metadata=rule(
            lambda v: (v or "none") in PRECISIONS, f"one of {', '.join(PRECISIONS)} (none: as stored)"
        )
    )
    compare: list[str] = field(
        metadata=rule(
            lambda v: len({p or "none" for p in v} & set(PRECISIONS)) == len(v),
            f'some of {", ".join(PRECISIONS)}, each once (--compare none int8; COMPARE = ("none", "int8"))',
        )
    )
    device: str = field(
        metadata=rule(
            lambda v: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v), "auto, cuda, cuda:N, mps or cpu"
        )
    )
    dtype: str = field(metadata=rule(lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"))
    compile: bool = field(metadata=YES_OR_NO)
    quanto_kernels: bool = field(metadata=YES_OR_NO)
    random_weights: bool = field(metadata=YES_OR_NO)
    question: str = field(metadata=rule(lambda v: type(v) is str and v.strip(), "some text"))
    chat: bool = field(metadata=YES_OR_NO)
    runs: int = field(metadata=at_least(1))
    warmup_runs: int = field(metadata=at_least(0))
    max_length: int = field(metadata=at_least(2))
    max_seconds: float = field(metadata=above_zero())
    compare_tokens: int = field(metadata=at_least(2))
    quality_tokens: int = field(metadata=at_least(0))
    quality_text: str | None = field(
        default=None, metadata=rule(lambda v: v is None or is_text(v), "a file with some text in UTF-8")
    )
    temperature: float = field(metadata=above_zero(" (for greedy decoding set DO_SAMPLE to False)"))
    do_sample: bool = field(metadata=YES_OR_NO)
    seed: int = field(metadata=at_least(0))
    trust_remote_code: bool = field(metadata=YES_OR_NO)
    results: str | None = field(
        metadata=rule(lambda v: v in (None, "-") or is_writable(v), "a file that can be written, or -")
    )
    report: str | None = field(
        metadata=rule(
            lambda v: v is None or (v.endswith((".svg", ".html")) and is_writable(v)),
            "a file that can be written, and ends in .svg or .html",
        )
    )
    chart: str | None = field(
        default=None,
        metadata=rule(
            lambda v: v is None or (v.endswith((".svg", ".png")) and is_writable(v)),
            "a file that can be written, and ends in .svg or .png",
        ),
    )


def convert(text: str, kind: str) -> Any:
    """The value that a flag's text means for a field of this type, or the text, for `check` to refuse."""
    if text.lower() == "none" and kind == "str | None":
        return None
    try:
        return {"int": int, "float": float}.get(kind, str)(text)
    except ValueError:
        return text


def parse(
    argv: list[str] | None, constants: dict[str, Any], script: Path
) -> tuple[Settings, argparse.Namespace]:
    """Settings from the constants and their flags; and the flags without a constant: debug, show.

    The second also has `given`, the flags on the command line. `script` is the file of the constants: the
    comments behind them are the flags' help, the first lines of its docstring the program's. A constant that
    an older copy of it lacks takes the field's default.
    """
    source = script.read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z_]+)(?::[^=]+)? = .*?  # (.+)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        "qwquanto.py",
        "python qwquanto.py [--FLAG VALUE ...]",
        (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0],
        allow_abbrev=False,
    )
    flags = []
    for f in dataclasses.fields(Settings):
        flag, default = "--" + f.name.replace("_", "-"), constants.get(f.name.upper(), f.default)
        told = f"{comments.get(f.name.upper(), '')} (now: {default})".replace("%", "%%")
        flags += [flag]
        if f.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=told)
        elif f.name == "compare":
            parser.add_argument(flag, nargs="*", default=default, metavar="WEIGHTS", help=told)
        else:
            to = functools.partial(convert, kind=f.type)
            parser.add_argument(
                flag, type=to, default=default, metavar=f.name.split("_")[-1].upper(), help=told
            )
    parser.add_argument(
        "--show", nargs="+", metavar="FILE", help="print saved results; several beside each other"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and libraries' messages")
    parser.add_argument("--version", action="version", version=__version__)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        wrong = next((text for text in unknown if text.startswith("-")), unknown[0]).split("=")[0]
        close = difflib.get_close_matches(wrong, [*flags, "--show", "--debug", "--version"], 1)
        close += [f"--model-name {wrong}"] if "/" in wrong or Path(wrong).exists() else []
        parser.error(f"unexpected argument {wrong}" + (f": did you mean {close[0]}?" if close else ""))
    words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    args.given = [flag for flag in flags if flag in words]
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)}
    if "--compare" in args.given:
        values["compare"] = values["compare"] or list(PRECISIONS)
    elif "--weights" in args.given:  # whoever names one precision wants a single run, whatever COMPARE says
        values["compare"] = []
    if isinstance(values["compare"], tuple | set):
        values["compare"] = list(values["compare"])
    return Settings(**values), args


def check(s: Settings) -> list[str]:
    """Everything that is impossible about the settings, each with what is allowed."""
    problems = []
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        try:
            right = f.metadata["holds"](value)
        except (TypeError, AttributeError, RuntimeError):  # a constant edited to another type, ~nobody/model
            right = False
        if not right:
            problems.append(f"{f.name.upper()} must be {f.metadata['allowed']}, not {value!r}")
    if s.chart and importlib.util.find_spec("matplotlib") is None:  # an option: only who asks needs it
        problems.append("CHART is drawn by matplotlib, which this Python lacks: pip install matplotlib")
    return problems


def unused(s: Settings, given: list[str]) -> list[str]:
    """Flags on the command line that would do nothing, each with what to do."""
    if s.compare:
        told = {
            "--weights is of a single run: name its precision behind --compare": "--weights" in given,
            "--max-length is of a single run: take --compare-tokens": "--max-length" in given,
            "--quality-text needs QUALITY_TOKENS above 0": "--quality-text" in given and not s.quality_tokens,
        }
        return [text for text, holds in told.items() if holds]
    instead = {"--compare-tokens": ", or take --max-length", "--quality-tokens": "", "--quality-text": ""}
    return [
        f"{flag} is of a comparison: add --compare{text}" for flag, text in instead.items() if flag in given
    ]
