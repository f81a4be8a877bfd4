"""The architecture: layers that depend downwards only, and one meaning for each name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# From the bottom to the top. A module imports from lower layers, or from its own package.
LAYERS = (
    ("arithmetic", "cli", "records"),
    ("files", "locks", "markdown", "outputs", "parallel", "schema"),
    ("contradictions", "json_files", "pictures", "recompute"),
    ("config",),
    ("checkpoints", "cpu"),
    ("runtime",),
    ("logps", "losses", "metrics"),
    ("models.glm4",),
    ("data",),
    ("inference", "plan", "training"),
    ("card", "check", "rehearsal", "serve"),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FILES = sorted((ROOT / "mindrlhf").rglob("*.py"))
PER_SCRIPT = {"main", "parser"}  # every command has them
PER_STAND_IN = {"install"}  # every module of cpu/ that replaces something has it
LONGEST_FUNCTION, LONGEST_FILE = 60, 400  # lines


def name_of(path: Path) -> str:
    """Module name below mindrlhf: `data.merge`, or `data` for its __init__."""
    parts = path.relative_to(ROOT / "mindrlhf").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES if name_of(path)}


def room_of(module: str) -> str:
    """The layer's entry that a module belongs to."""
    return next((room for room in LAYER if module == room or module.startswith(room + ".")), module)


def imports_of(path: Path) -> Iterator[str]:
    """Modules of mindrlhf that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "mindrlhf" or name.startswith("mindrlhf."):
                inner = name.removeprefix("mindrlhf.")
                while inner and inner not in MODULES:
                    inner = inner.rpartition(".")[0]
                if inner:
                    yield inner


GRAPH = {module: set(imports_of(path)) - {module} for module, path in MODULES.items()}


def test_every_module_has_a_layer():
    packages = {"models"}
    assert not [
        module for module in MODULES if room_of(module) not in LAYER and module not in packages
    ]


def test_arrows_go_down():
    upwards = [
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        for other in others
        if room_of(module) != room_of(other) and LAYER[room_of(other)] >= LAYER[room_of(module)]
    ]
    assert not upwards


def test_there_is_no_circle():
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"circle: {' -> '.join((*path, module))}"
        if module not in state:
            state[module] = 1
            for other in GRAPH[module]:
                visit(other, (*path, module))
            state[module] = 2

    for module in GRAPH:
        visit(module, ())


def test_the_library_depends_on_no_script():
    scripts = {
        path.stem
        for path in (
            *ROOT.glob("*.py"),
            *(ROOT / "examples/glm4_dpo").glob("*.py"),
            *(ROOT / "scripts").rglob("*.py"),
        )
    }
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not scripts & {name.split(".")[0] for name in names}, path
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"), (
                f"{path} edits sys.path"
            )


def test_no_two_files_share_a_name():
    found = defaultdict(list)
    for path in FILES:
        if path.stem not in ("__init__", "__main__"):
            found[path.name].append(path)
    assert not [paths for paths in found.values() if len(paths) > 1]


def test_no_two_functions_or_classes_share_a_name():
    found = defaultdict(list)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                found[node.name].append(module)
    shared = {
        name: modules
        for name, modules in found.items()
        if len(modules) > 1 and name not in PER_SCRIPT | PER_STAND_IN
    }
    assert not shared


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_of_a_readable_size(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= LONGEST_FUNCTION, f"{node.name}: {size} lines"


def test_the_newcomer_reads_at_most_500_lines():
    read = (
        "README.md",
        "mindrlhf/losses.py",
        "mindrlhf/data/features.py",
        "examples/glm4_dpo/run_dpo.py",
    )
    assert sum((ROOT / name).read_text(encoding="utf-8").count("\n") for name in read) <= 500


@pytest.mark.parametrize("readme", ["README.md", "README_CN.md"])
def test_the_module_map_lists_every_file(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    listed = [path for path in FILES if path.stem not in ("__init__", "__main__")]
    assert not [str(path.relative_to(ROOT)) for path in listed if f"`{path.name}`" not in text]
