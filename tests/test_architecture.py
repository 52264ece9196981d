"""The shape of the package: which room may import which, what stays private, how long things grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import bptool

PACKAGE = Path(bptool.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A file may import from its own room and from those on lower floors, not from a neighbour on the same floor.
FLOORS = [
    {"errors", "units"},
    {"gpus", "files", "native_output"},
    {"hardware"},
    {"config"},
    {"interop"},
    {"model", "data"},
    {"training"},
    {"instruments"},
    {"analysis"},
    {"report"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The public face and `python -m bptool` stand outside the house.
OUTSIDE = {"bptool", "bptool.__main__"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 70


class Import(NamedTuple):
    module: str
    name: str
    """What is taken out of the module; empty: the module itself."""
    line: int
    at_import_time: bool


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    return module.split(".")[1]


def imports(tree: ast.AST, at_import_time: bool = True) -> Iterator[Import]:
    """Every import below `tree`, those inside functions and `if TYPE_CHECKING:` among them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "", node.lineno, at_import_time) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                yield Import(node.module or "", alias.name, node.lineno, at_import_time)
        else:
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            later = later or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
            yield from imports(node, at_import_time and not later)


def imports_of(file: Path) -> list[Import]:
    return list(imports(ast.parse(file.read_text("utf-8"))))


def names_a_room(found: Import) -> str:
    """The room that an import of ours reaches into, or nothing for other people's modules."""
    parts = [*found.module.split("."), *([found.name] if found.name else [])]
    return parts[1] if parts[0] == "bptool" and len(parts) > 1 and parts[1] in FLOOR_OF else ""


each_file = pytest.mark.parametrize("file", FILES, ids=[module_name(file) for file in FILES])


def test_every_room_has_a_floor() -> None:
    rooms = {room(module_name(file)) for file in FILES if module_name(file) not in OUTSIDE}
    assert rooms <= FLOOR_OF.keys()
    assert {"errors", "units", "config"} <= rooms


@each_file
def test_imports_point_down(file: Path) -> None:
    if module_name(file) in OUTSIDE:
        return
    here = room(module_name(file))
    upward = [
        f"line {found.line}: {here} imports {there}"
        for found in imports_of(file)
        if (there := names_a_room(found)) and there != here and FLOOR_OF[there] >= FLOOR_OF[here]
    ]
    assert not upward


@each_file
def test_nobody_uses_a_private_name_of_another_module(file: Path) -> None:
    """Neither `from bptool.x import _y` nor `x._y` on a module of ours."""
    tree = ast.parse(file.read_text("utf-8"))
    ours = [found for found in imports(tree) if found.module.split(".")[0] == "bptool"]
    taken = [found for found in ours if is_private(found.name) or any(map(is_private, found.module.split(".")))]
    modules = {found.name for found in ours if (PACKAGE.parent / path_of(found)).exists()}
    reached = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr)
        if isinstance(node.value, ast.Name) and node.value.id in modules
    ]
    assert not taken
    assert not reached


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def path_of(found: Import) -> Path:
    return Path(*found.module.split("."), f"{found.name}.py")


@each_file
def test_files_and_functions_stay_short(file: Path) -> None:
    source = file.read_text("utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    long = [f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > LONGEST_FUNCTION]
    assert not long


@each_file
def test_settings_and_errors_know_no_torch(file: Path) -> None:
    if room(f"{module_name(file)}.") in {"config", "errors", "units"}:
        assert not [found for found in imports_of(file) if found.module.split(".")[0] == "torch"]


def test_the_command_line_and_the_config_start_without_torch() -> None:
    """Imported for real, in a fresh interpreter: also what the imported modules import in turn."""
    light = [module_name(f) for f in FILES if room(f"{module_name(f)}.") in {"cli", "config", "errors", "units", ""}]
    program = "import sys\n" + "".join(f"import {module}\n" for module in light)
    program += "heavy = {'torch', 'numpy', 'tensorboard', 'matplotlib', 'safetensors', 'transformers'}\n"
    program += "sys.exit(' '.join(heavy & sys.modules.keys()) or 0)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stderr == ""  # a heavy module is named there, as is an import that fails


def test_the_checks_above_see_what_they_look_for() -> None:
    tree = ast.parse("import a\nif TYPE_CHECKING:\n    from bptool.cli import _x\ndef f():\n    import torch")
    assert list(imports(tree)) == [
        Import("a", "", 1, True),
        Import("bptool.cli", "_x", 3, False),
        Import("torch", "", 5, False),
    ]
    assert [names_a_room(found) for found in imports(tree)] == ["", "cli", ""]
    assert names_a_room(Import("bptool", "units", 1, True)) == "units"
    assert is_private("_x")
    assert not is_private("__version__")
