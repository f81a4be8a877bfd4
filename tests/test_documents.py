"""The documents: complete, the same in both languages, and their CPU commands run."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import EXAMPLE, ROOT

from mindrlhf import config

PAIRS = (
    ("README.md", "README_CN.md"),
    ("examples/glm4_dpo/README.md", "examples/glm4_dpo/README_CN.md"),
    ("docs/several_machines.md", "docs/several_machines_CN.md"),
    ("docs/faults.md", "docs/faults_CN.md"),
    ("SECURITY.md", "SECURITY_CN.md"),
)
TUTORIALS = PAIRS[1]
# Name in the header of a table of options -> module with parser().
PARSERS = {
    "make_tiny_glm4.py": "make_tiny_glm4",
    "convert_weight.py": "convert_weight",
    "dpo_preprocess_glm4_parallel.py": "dpo_preprocess_glm4_parallel",
    "run_dpo.py": "run_dpo",
    "transform_checkpoint.py": "transform_checkpoint",
    "mindrlhf.check": "mindrlhf.check",
    "mindrlhf.plan": "mindrlhf.plan.__main__",
    "mindrlhf.data.show": "mindrlhf.data.show",
    "mindrlhf.config": "mindrlhf.config.__main__",
    "mindrlhf.serve": "mindrlhf.serve.__main__",
    "mindrlhf.card add": "mindrlhf.card.add",
    "mindrlhf.card verify": "mindrlhf.card.verify",
}
CPU, PRINTED = "sh cpu", "text printed"  # info strings: what the test runs, and what that prints


class Fence(NamedTuple):
    """A code block: its info string and its text."""

    info: str
    body: str


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def fences(text: str) -> list[Fence]:
    return [Fence(*match) for match in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M)]


def prose(text: str) -> list[str]:
    """Lines outside of code blocks."""
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", text, flags=re.M).splitlines()


def tables(text: str) -> list[list[str]]:
    """Lines of each table, without the line below its header."""
    found: list[list[str]] = [[]]
    for line in prose(text):
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [[lines[0], *lines[2:]] for lines in found if lines]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def quoted(text: str) -> list[str]:
    """What is in backticks."""
    return re.findall(r"`([^`]+)`", text)


def first_column(text: str, name: str) -> list[str]:
    """Words in backticks in the first column of the table whose header has a name."""
    (table,) = [lines for lines in tables(text) if name in cells(lines[0])[0]]
    return [word for line in table[1:] for word in quoted(cells(line)[0])]


def options(module: str) -> set[str]:
    """Options and positional arguments of a command, as its help names them."""
    actions = importlib.import_module(module).parser()._actions
    return {
        action.option_strings[-1] if action.option_strings else action.metavar
        for action in actions
        if not isinstance(action, argparse._HelpAction)
    }


@pytest.mark.parametrize("tutorial", TUTORIALS)
@pytest.mark.parametrize("name", PARSERS)
def test_the_tutorial_lists_the_options_of_every_command(tutorial: str, name: str) -> None:
    found = first_column(read(tutorial), name)
    assert len(found) == len(set(found))
    assert set(found) == options(PARSERS[name])


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_the_tutorial_lists_the_arguments_of_the_launcher(tutorial: str) -> None:
    usage = read("scripts/msrun_launcher.sh").split("<<EOF")[1].split("EOF")[0]
    wanted = re.findall(r"^  ([A-Z_]+) ", usage, re.M)
    assert len(wanted) == 9
    (table,) = [lines for lines in tables(read(tutorial)) if "`COMMAND`" in lines[1]]
    assert [quoted(cells(line)[0])[0] for line in table[1:]] == wanted


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_the_tutorial_lists_the_arguments_of_the_rehearsal(tutorial: str) -> None:
    (usage,) = re.findall(r"rehearse.sh (CONFIG.*?);", read("scripts/rehearse.sh"))
    wanted = re.findall(r"[A-Z_]+", usage)
    assert first_column(read(tutorial), "rehearse.sh") == [*wanted, "DEVICE"]


def leaf_keys(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a YAML; those of a callback are callbacks.TYPE.KEY."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaf_keys(value, f"{prefix}{key}.")
        elif key == "callbacks":
            for entry in value:
                yield from (f"callbacks.{entry['type']}.{name}" for name in entry if name != "type")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_the_tutorial_explains_every_key_of_the_yamls(tutorial: str) -> None:
    explained = {
        word for table in tables(read(tutorial)) for line in table for word in quoted(line)
    }
    for path in sorted(EXAMPLE.glob("*.yaml")):
        missing = [key for key in leaf_keys(config.read_yaml(path)) if key not in explained]
        assert not missing, path.name


def without_language(fence: Fence) -> list[str]:
    """A code block without comments and natural language; of a text, only the number of lines."""
    lines = fence.body.splitlines()
    if fence.info.startswith("text"):
        return [""] * len(lines)
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in lines]
    return [re.sub(r'(--predict_data) "[^"]*"', r"\1", line) for line in lines]


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_structure(english: str, chinese: str) -> None:
    one, other = read(english), read(chinese)
    levels = [
        [line.split()[0] for line in prose(text) if line.startswith("#")] for text in (one, other)
    ]
    assert levels[0] == levels[1]
    blocks = [
        [(fence.info, without_language(fence)) for fence in fences(text)] for text in (one, other)
    ]
    assert blocks[0] == blocks[1]
    sizes = [[(len(table), len(cells(table[0]))) for table in tables(t)] for t in (one, other)]
    assert sizes[0] == sizes[1]
    items = [sum(line.lstrip().startswith("- ") for line in prose(t)) for t in (one, other)]
    assert items[0] == items[1]


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_name_the_same_things(english: str, chinese: str) -> None:
    """Table by table and row by row, the words in backticks are the same, in any order."""
    for one, other in zip(tables(read(english)), tables(read(chinese))):
        for line, translated in zip(one, other):
            assert sorted(quoted(line)) == sorted(quoted(translated))


@pytest.mark.parametrize("document", [name for pair in PAIRS for name in pair])
def test_links_within_documents_lead_to_headings(document: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", read(document)):
        path = (ROOT / document).parent / target if target else ROOT / document
        titles = [
            line.lstrip("# ")
            for line in prose(path.read_text(encoding="utf-8"))
            if line.startswith("#")
        ]
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert anchor in slugs


@pytest.mark.parametrize("document", [name for pair in PAIRS for name in pair])
def test_no_block_changes_the_folder_of_the_next(document: str) -> None:
    for fence in fences(read(document)):
        assert not re.search(r"^cd ", fence.body, re.M)


def test_both_languages_use_one_word_for_a_thing() -> None:
    for _, chinese in PAIRS:
        text = read(chinese)
        for word in ("分片", "并行策略", "并行计划", "模型的数字", "模型参数配置"):
            assert word not in text, chinese


def without_measurements(text: str) -> list[str]:
    """Lines with N for decimals, speeds and fingerprints, and single spaces."""
    text = re.sub(r"\b[0-9a-f]{12}\b", "N", text)
    text = re.sub(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?|\d+(?= tokens/s)", "N", text)
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project's commands, whose .venv is the environment of this test."""
    if not (Path(sys.prefix) / "installed.txt").exists():
        pytest.skip("not in the environment that scripts/setup.sh made; it would install packages")
    left_out = (".*", "output", "tests", "benchmarks", "rank_*", "kernel_meta", "__pycache__")
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left_out))
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


def test_the_cpu_commands_of_the_tutorial_end_with_an_answer(project: Path) -> None:
    """All CPU blocks of the English tutorial in order, then the question of the Chinese one."""
    blocks, translated = (fences(read(tutorial)) for tutorial in TUTORIALS)
    commands = [fence.body for fence in blocks if fence.info == CPU]
    question = [fence.body for fence in translated if fence.info == CPU][-1]
    result = subprocess.run(
        ["bash", "-e", "-c", "".join([*commands, question])],
        cwd=project / "examples/glm4_dpo",
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    screen = without_measurements(result.stdout)
    printed = [fence.body for fence in blocks if fence.info == PRINTED]
    for line in without_measurements("".join(printed)):
        assert line in screen
    answers = [printed[-1], [fence.body for fence in translated if fence.info == PRINTED][-1]]
    assert result.stdout.endswith("".join(answers))
