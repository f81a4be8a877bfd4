"""The list of operators: its document, and what scripts/list_operators.py makes of a graph.

Nothing is compiled.
"""

import importlib.util
import re
import sys

import pytest
from conftest import ROOT

from mindrlhf import cli

spec = importlib.util.spec_from_file_location("list_operators", ROOT / "scripts/list_operators.py")
operators = importlib.util.module_from_spec(spec)
sys.modules["list_operators"] = operators  # where dataclasses look for the types of their fields
spec.loader.exec_module(operators)

GRAPH = """subgraph attr:
subgraph @1_construct(%para1_x) {
  %0(CNode_1) = Load(%para1_x, UMonad[U])
      : (<Ref[Tensor[BFloat16]], (4, 8)>, <UMonad, NoShape>) -> (<Tensor[BFloat16], (4, 8)>)
  %1(CNode_2) = PrimFunc_FlashAttentionScore(%0, %0, None) {instance name: flash_attention}
      : (<Tensor[BFloat16], (4, 8)>, <Tensor[UInt8], (4, 4)>, <None, NoShape>) \
-> (<Tuple[Tensor[Float32]*2,Tensor[BFloat16]]>)
      # In file dpo.py:57, 17~33/        hidden = self.transformer(input_ids)/
  %2(CNode_3) = %1[@FuncUnion(@2, @3)](%0)
      : (<Tensor[BFloat16], (4, 8)>) -> (<Tensor[BFloat16], (4, 8)>)
  %3(CNode_4) = GetNext() primitive_attrs: {shared_name: "data"}
      : () -> (<Tuple[Tensor[Int32]*4,Tensor[Float32]], TupleShape((4, 8), (4))>)
  Return(%3)
      : (<Tensor[Int32], (4, 8)>)
}
"""


@pytest.fixture(scope="module")
def rows():
    return operators.read_document(operators.DOCUMENT.read_text(encoding="utf-8"))


def test_every_operator_has_been_looked_up(rows):
    assert len(rows) > 50
    for row in rows:
        assert row.ascend != operators.UNKNOWN, row.operator
        for source in row.source.split("; "):
            assert re.fullmatch(
                r"(doc|py|infer|ascend|mindspore|tests)/[\w/]+\.(yaml|py|cc|h):\d+", source
            ), row.operator


def test_unsupported_and_unclear_come_first_and_say_why(rows):
    assert rows == sorted(rows, key=lambda row: (operators.STATES.index(row.state), row.operator))
    assert all(len(row.ascend) > 60 for row in rows if row.state != "supported")


def test_graphs_and_types_are_given(rows):
    assert len({row.operator for row in rows}) == len(rows)
    for row in rows:
        assert set(row.graphs) <= set(operators.GRAPHS), row.operator
        assert all(" -> " in types for types in row.types), row.operator


def test_a_graph_is_read():
    assert list(operators.read_graph(GRAPH)) == [
        ("FlashAttentionScore", "bfloat16, uint8 -> float32, bfloat16"),
        ("GetNext", "- -> int32, float32"),
    ]


def test_a_new_operator_is_unclear_and_one_that_is_gone_is_said(rows):
    known = rows[-2:]
    kept, gone = known
    seen = {
        kept.operator: operators.Use(set(kept.graphs), {*kept.types, "int8 -> int8"}),
        "Invented": operators.Use({"train"}, {"float32 -> float32"}),
    }
    merged = operators.merge(known, seen)
    assert [row.operator for row in merged] == ["Invented", kept.operator]
    assert merged[0].ascend == "unclear: not looked up"
    assert merged[1].ascend == kept.ascend
    new, left, types = operators.differences(known, merged)
    assert new == "Invented: new, in train"
    assert left == f"{gone.operator}: in no graph any more"
    assert "int8 -> int8" in types
    assert operators.differences(rows, rows) == []


def test_the_document_is_written_as_it_was_read(rows, tmp_path):
    copy = tmp_path / "operators.md"
    text = operators.DOCUMENT.read_text(encoding="utf-8")
    copy.write_text(text + "\nbelow\n", encoding="utf-8")
    operators.write_document(copy, rows)
    assert copy.read_text(encoding="utf-8") == text + "\nbelow\n"


def test_a_damaged_row_is_said():
    with pytest.raises(cli.UserError, match="6 cells expected.*Broken"):
        operators.read_document(
            f"{operators.HEAD}\n|---|\n| Broken | train | - -> int32 | perhaps | - | - |\n"
        )
