"""The table in mindrlhf/cpu/__init__.py lists each patch of MindFormers and MindSpore."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from mindrlhf import cpu
from mindrlhf.cpu import operators

PATCHED = ("mindformers", "mindspore")
FILES = sorted((ROOT / "mindrlhf").rglob("*.py"))
LISTED = set(re.findall(r"^ {4}((?:mindformers|mindspore)\.\S+)$", cpu.__doc__, re.MULTILINE))


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> full name of everything that a file imports from MindFormers or MindSpore."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
        elif (
            isinstance(node, (ast.Assign, ast.AnnAssign))
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "importlib.import_module"
            and isinstance(node.value.args[0], ast.Constant)
        ):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {ast.unparse(target): node.value.args[0].value for target in targets}
    return {name: full for name, full in names.items() if full.split(".")[0] in PATCHED}


def assigned(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Every attribute that a file assigns to, by itself or in a tuple."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node


def patches_of(tree: ast.AST) -> set[str]:
    """Full names of attributes of imported modules and classes that a file assigns to."""
    names, found = imported_names(tree), set()
    for node in assigned(tree):
        root, _, rest = ast.unparse(node).partition(".")
        if root in names:
            found.add(f"{names[root]}.{rest}")
    return found


def test_the_collector_finds_each_kind_of_assignment():
    source = """
import importlib
import mindspore as ms
import mindspore.dataset
from mindspore import nn
def patch():
    from mindformers.trainer import base_trainer as trainer
    context = importlib.import_module("mindformers.core.context")
    typed: Any = importlib.import_module("mindformers.core.typed")
    trainer.pprint, context.INSTANCE, typed.INSTANCE = None, None, None
    nn.Cell.f = ms.ops.g = 1
    mindspore.dataset.h: int = 1
    other.x = nn.Cell.y
"""
    assert patches_of(ast.parse(source)) == {
        "mindformers.trainer.base_trainer.pprint",
        "mindformers.core.context.INSTANCE",
        "mindformers.core.typed.INSTANCE",
        "mindspore.nn.Cell.f",
        "mindspore.ops.g",
        "mindspore.dataset.h",
    }


def test_the_table_lists_every_patch_and_no_other():
    found = set(operators.REPLACED)
    for path in FILES:
        found |= patches_of(ast.parse(path.read_text(encoding="utf-8")))
    assert found == LISTED


def test_only_the_operators_are_patched_by_setattr():
    callers = {
        path.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"
    }
    assert callers <= {"operators.py"}


@pytest.mark.parametrize(
    ("file", "function"), [("cells.py", "replace_cells"), ("patches.py", "fix_cpu")]
)
def test_the_table_lists_every_cell_that_is_replaced(file, function):
    tree = ast.parse(Path(cpu.__file__).with_name(file).read_text(encoding="utf-8"))
    body = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
    replaced = {node.attr for node in assigned(body)} - {"name"}  # of parameters
    assert replaced
    assert not [name for name in replaced if f".{name}" not in cpu.__doc__]


@pytest.mark.parametrize("name", sorted(LISTED))
def test_what_is_replaced_exists(name):
    module, attribute = name.rpartition(".")[::2]
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:  # a class
        package, owner_name = module.rsplit(".", 1)
        owner = getattr(importlib.import_module(package), owner_name)
    assert hasattr(owner, attribute)
