"""Options of the fault suite, the golden case as files, and the table of what was injected."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import GOLDEN, write_overlay

from faults.harness import TRAINING

FIGURES: dict[str, Counter] = {}  # fault -> outcome -> how often


def pytest_addoption(parser):
    group = parser.getgroup("faults")
    group.addoption(
        "--kills", type=int, help="kills of each command; two fifths of it of training (default: 5)"
    )
    group.addoption("--flips", type=int, help="flipped bits in each kind of file (default: 20)")
    group.addoption("--seed", type=int, help="of the random moments and places (default: 0)")


def option(request, name, default):
    """An option; `pytest tests` does not know it, because pytest reads this file too late."""
    given = request.config.getoption(name, None)
    return default if given is None else given


@pytest.fixture(scope="session")
def kills(request):
    return option(request, "--kills", 5)


@pytest.fixture(scope="session")
def flips(request):
    return option(request, "--flips", 20)


@pytest.fixture(scope="session")
def seed(request):
    return option(request, "--seed", 0)


@pytest.fixture
def count():
    """count(fault, outcome) adds one to the table."""

    def add(fault, outcome, times=1):
        FIGURES.setdefault(fault, Counter())[outcome] += times

    return add


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("faults injected")
    for fault, outcomes in FIGURES.items():
        listed = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        terminalreporter.write_line(f"{fault}: {sum(outcomes.values())}: {listed}")


@pytest.fixture(scope="session")
def case(golden, tmp_path_factory):
    """The golden case with 64 pairs, so that preprocessing makes 5 parts, and 8 training steps."""
    folder = tmp_path_factory.mktemp("case")
    rows = (GOLDEN / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    lines = []
    for number in range(8):
        for row in map(json.loads, rows):
            lines.append(json.dumps({**row, "prompt": f"{number} {row['prompt']}"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_overlay(folder / "finetune.yaml", "finetune", TRAINING)
    write_overlay(folder / "process.yaml", "process", seq_len=192)
    return SimpleNamespace(
        folder=folder,
        hf=GOLDEN / "hf_glm",
        pairs=folder / "pairs.jsonl",
        process=folder / "process.yaml",
        finetune=folder / "finetune.yaml",
        checkpoint=golden.checkpoint,
        tokenizer=golden.tokenizer,
        data=golden.data,
    )
