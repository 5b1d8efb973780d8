"""Which room may import what: the folder is the wall."""

import ast
import re
import sys
from pathlib import Path

from conftest import ROOT

GROUND = {"__init__", "settings", "results", "stats", "text", "channel"}
WORKER = {"torch", "transformers", "optimum", "accelerate", "psutil", "pynvml", "numpy", "triton"}
WORKER |= {"huggingface_hub", "safetensors", "tqdm"}
LATE = {  # room -> what it imports within a function, and why
    "qwquanto": {
        "_qwquanto.compiled": "torch is imported when compile_decode is asked for",
        "_qwquanto": "a program that imports qwquanto for compile_decode needs no rich",
    },
    "sheet": dict.fromkeys(
        ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"),
        "an option that few have: imported when a chart is drawn",
    ),
    "worker/__init__": {"_qwquanto.worker.measure": "the parent's end is watched while torch is imported"},
}
ROOMS = {
    path.relative_to(ROOT / "_qwquanto").with_suffix("").as_posix(): ast.parse(path.read_text("utf-8"))
    for path in sorted((ROOT / "_qwquanto").rglob("*.py"))
}
ROOMS["qwquanto"] = ast.parse((ROOT / "qwquanto.py").read_text("utf-8"))


def imported(node):
    """Dotted names of the modules that an import statement takes; of the package's rooms, each by itself."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    whole = ["_qwquanto." + alias.name for alias in node.names if alias.name in ROOMS]
    rooms = [f"{node.module}.{alias.name}" for alias in node.names]
    rooms = [name for name in rooms if name.removeprefix("_qwquanto.").replace(".", "/") in ROOMS]
    return rooms if node.module.startswith("_qwquanto") and (rooms or whole) else [node.module]


def imports(tree):
    return {name for node in ast.walk(tree) for name in imported(node)}


def room_of(module):
    """The room that a module of the package is, None for others; a package is its __init__."""
    name = module.removeprefix("_qwquanto").lstrip(".").replace(".", "/")
    if not module.startswith("_qwquanto"):
        return None
    return name if name in ROOMS else f"{name}/__init__".lstrip("/")


def within(room):
    return {found for name in imports(ROOMS[room]) if (found := room_of(name))} - {"__init__"}


def test_only_the_worker_and_the_compiled_step_import_torch():
    for room, tree in ROOMS.items():
        foreign = {name.split(".")[0] for name in imports(tree)} - sys.stdlib_module_names - {"_qwquanto"}
        if room.startswith(("worker/", "compiled/")):
            assert "rich" not in foreign, room
        else:
            assert foreign <= {"console": {"rich"}, "sheet": {"matplotlib"}}.get(room, set()), room


def test_imports_point_downwards():
    for room in ROOMS:
        if room in GROUND:
            assert within(room) <= GROUND, room
        elif room.startswith("compiled/"):
            ours = {name for name in within(room) if not name.startswith("compiled/")}
            assert ours <= {"channel"}, room
        elif room.startswith("worker/"):
            assert all(n in GROUND or n.startswith(("worker/", "compiled/")) for n in within(room)), room
        elif room != "qwquanto":
            assert not any(name.startswith(("worker/", "compiled/", "qwquanto")) for name in within(room)), (
                room
            )


def test_the_compiled_step_knows_failure_alone():
    for room, tree in ROOMS.items():
        if room.startswith("compiled/"):
            taken = [
                n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "_qwquanto.channel"
            ]
            assert {alias.name for node in taken for alias in node.names} <= {"Failure"}, room


def test_no_circles():
    def visit(room, path):
        assert room not in path, " -> ".join([*path, room])
        for other in sorted(within(room)):
            visit(other, [*path, room])

    for room in ROOMS:
        visit(room, [])


def test_imports_within_functions_have_a_reason():
    for room, tree in ROOMS.items():
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        late = {n.module for f in functions for n in ast.walk(f) if isinstance(n, ast.ImportFrom)}
        late |= {a.name for f in functions for n in ast.walk(f) if isinstance(n, ast.Import) for a in n.names}
        assert late == set(LATE.get(room, {})), room


def test_tests_of_the_ground_and_the_program_import_no_torch():
    """So that they need a second; test_upstream and test_gpu are of the worker."""
    torch = (WORKER | {"models", "zoo", "fake_model"}) - {"psutil"}  # the last three are of the tests
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        taken = {name for node in tree.body for name in imported(node)}
        heavy = {n for n in taken if n.split(".")[0] in torch}
        heavy |= {n for n in taken if n.startswith(("_qwquanto.worker", "_qwquanto.compiled"))}
        assert not heavy or path.name in ("test_gpu.py", "test_upstream.py"), (path.name, heavy)


def test_a_room_says_its_job_and_has_no_name_of_the_standard_librarys():
    for room, tree in ROOMS.items():
        assert ast.get_docstring(tree), room
        assert Path(room).name == "__init__" or Path(room).name not in sys.stdlib_module_names, room


def test_readme_has_a_phrase_for_every_room():
    tree = re.search(r"<!-- tree -->\n```\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)[1]
    for room in ROOMS:
        name = room.split("/")[-1]
        assert name == "__init__" or re.search(rf"^(.* )?{name}(\.py)? {{2,}}\S", tree, re.MULTILINE), room
