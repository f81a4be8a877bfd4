"""Users' versions have every name of MindSpore, MindFormers and MindPet that the code uses.

golden/api24.tsv says where MindSpore 2.4.10 or MindFormers 1.3.0 defines each, and with which
arguments the code calls it. All were read in public sources: repository
mindspore-ai/mindspore_test, tag v2.4.10; MindFormers, tag v1.3.0 (its branch r1.3.0 is 1.3.2 by
now). No test reads the lines of the kind `other`, such as attributes of objects, because a syntax
tree does not show them. LEFT_OUT runs only with MindSpore 2.7, on CPUs.
"""

from __future__ import annotations

import ast
import csv

from conftest import ROOT

PACKAGES = ("mindspore.", "mindformers.", "mindpet.")
LEFT_OUT = (
    "scripts/rig/",
    "scripts/list_operators.py",
    "mindrlhf/cpu/attention.py",
    "mindrlhf/cpu/operators.py",
    "mindrlhf/cpu/sink.py",
    "mindrlhf/cpu/rules.py",
)
READ_IT = "read it in the v2.4.10 source, then add it to tests/golden/api24.tsv"


def arguments(positional: int, keywords: list[str]) -> set[str]:
    """What a call gives: `argument 1` and so on, and keywords; `**` for those of a dict."""
    return {f"argument {number + 1}" for number in range(positional)} | set(keywords)


class Collector(ast.NodeVisitor):
    """Collects what a module imports, refers to, calls and assigns to.

    super().__init__() calls the first base class.
    """

    def __init__(self, uses: dict[str, set[str]]):
        self.uses = uses  # full name -> arguments of all calls, filled here
        self.bound: dict[str, str] = {}  # local name -> full name, in the scope that is visited
        self.base = ""  # full name of the first base of the class that is visited

    def use(self, name: str) -> set[str]:
        """Arguments of a full name so far; a new set, not stored, for names of other packages."""
        return self.uses.setdefault(name, set()) if name.startswith(PACKAGES) else set()

    def resolve(self, node: ast.AST) -> str:
        """Full name of `a` or `a.b.c`; empty where `a` was not imported."""
        if isinstance(node, ast.Name):
            return self.bound.get(node.id, "")
        inner = self.resolve(node.value) if isinstance(node, ast.Attribute) else ""
        return inner and f"{inner}.{node.attr}"

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            self.use(module + alias.name)
            name = alias.asname or alias.name.split(".")[0]
            self.bound[name] = module + alias.name if module or alias.asname else name

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign) -> None:
        """`module = importlib.import_module("a.b")` is an import."""
        self.generic_visit(node)
        call = node.value
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if (
            isinstance(call, ast.Call)
            and self.resolve(call.func) == "importlib.import_module"
            and isinstance(call.args[0], ast.Constant)
            and isinstance(target, ast.Name)
        ):
            self.visit_Import(ast.Import([ast.alias(call.args[0].value, target.id)]))

    def visit_Name(self, node: ast.Name | ast.Attribute) -> None:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            self.bound.pop(node.id, None)
        self.use(self.resolve(node))
        if not self.resolve(node):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = (
            self.base if ast.unparse(node.func) == "super().__init__" else self.resolve(node.func)
        )
        self.use(name).update(
            arguments(len(node.args), [keyword.arg or "**" for keyword in node.keywords])
        )
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef | ast.FunctionDef | ast.Lambda) -> None:
        """What a class or function binds ends with it; parameters hide outer names."""
        outer, given = (
            (self.bound, self.base),
            ast.walk(getattr(node, "args", ast.Pass())),
        )  # a class has no parameters
        self.bound = {**self.bound, **{each.arg: "" for each in given if isinstance(each, ast.arg)}}
        if isinstance(node, ast.ClassDef):
            self.base = self.resolve(node.bases[0]) if node.bases else ""
        self.generic_visit(node)
        self.bound, self.base = outer

    visit_AnnAssign, visit_ImportFrom, visit_Attribute = visit_Assign, visit_Import, visit_Name
    visit_FunctionDef = visit_Lambda = visit_ClassDef


def used(*sources: str) -> dict[str, set[str]]:
    """Names that some sources use, with the arguments that they give."""
    uses: dict[str, set[str]] = {}
    for source in sources:
        Collector(uses).visit(ast.parse(source))
    return uses


def differences(uses: dict[str, set[str]], table: dict[str, set[str]]) -> str:
    """How code and table differ, in words; empty where they agree."""
    more = {
        f"{name}({', '.join(sorted(given - table.get(name, given)))})"
        for name, given in uses.items()
    }
    found = {
        f"not in the table, {READ_IT}": set(uses) - set(table),
        f"given arguments that the table lacks, {READ_IT}": {
            call for call in more if not call.endswith("()")
        },
        "in the table, but the code no longer uses it": set(table) - set(uses),
    }
    return "\n".join(
        f"{what}: {', '.join(sorted(names))}" for what, names in found.items() if names
    )


def test_the_table_lists_what_the_code_uses():
    paths = [
        path
        for pattern in ("*.py", "mindrlhf/**/*.py", "examples/**/*.py", "scripts/**/*.py")
        for path in ROOT.glob(pattern)
        if not path.relative_to(ROOT).as_posix().startswith(LEFT_OUT)
    ]
    rows = csv.DictReader(
        (ROOT / "tests/golden/api24.tsv").read_text(encoding="utf-8").splitlines(), delimiter="\t"
    )
    table = {
        row["name"]: arguments(int(row["positional"]), row["keywords"].split())
        for row in rows
        if row["kind"] == "name"
    }
    assert not (
        problems := differences(used(*(path.read_text(encoding="utf-8") for path in paths)), table)
    ), problems


def test_what_is_not_listed_is_found():
    uses = used(
        "import mindspore as ms\ndef f(nn):\n    from mindspore import ops\n"
        "    ops.depend(nn.Cell, x=ms.hal.a())",
        "import importlib\nm = importlib.import_module('mindformers.trainer')\nm.pprint = None",
        "from mindspore import Tensor as T\nclass A(T):\n    def __init__(self):\n"
        "        super().__init__(init=1)",
    )
    assert uses == {
        "mindspore.ops": set(),
        "mindspore.ops.depend": {"argument 1", "x"},
        "mindspore.hal.a": set(),
        "mindformers.trainer": set(),
        "mindformers.trainer.pprint": set(),
        "mindspore.Tensor": {"init"},
    }
    table = {**uses, "mindspore.Tensor": set(), "mindspore.ops.Old": set()}
    assert differences({**uses, "mindspore.ops.New": set()}, table).splitlines() == [
        f"not in the table, {READ_IT}: mindspore.ops.New",
        f"given arguments that the table lacks, {READ_IT}: mindspore.Tensor(init)",
        "in the table, but the code no longer uses it: mindspore.ops.Old",
    ]
