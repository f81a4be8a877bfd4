"""Answers of a model beside those of the model that it was trained from."""
from __future__ import annotations

import argparse
import contextlib
import shutil
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf import cli, locks
from mindrlhf.cli import UserError
from mindrlhf.files import atomic_file, read_head
from mindrlhf.inference.answer_file import in_order, json_line
from mindrlhf.inference.engine import Answer, Engine
from mindrlhf.inference.loading import Model, load_engine, strategies
from mindrlhf.inference.prompts import Prompt, as_json, with_system
from mindrlhf.inference.sampling import Sampling
from mindrlhf.markdown import fenced
from mindrlhf.models.glm4 import load, sidecar
from mindrlhf.outputs import Output, require_no_loss, require_overwrite

BASE = "base"  # of --compare_with: load_checkpoint without its adapters
TITLE = "# Answers of two models"  # first line of the Markdown file
SMALLEST_COLUMN, GAP = 20, " | "  # of the terminal


class AnswerPair(NamedTuple):
    """The two answers to a prompt.

    Attributes:
        prompt: of both.
        own: the answer of load_checkpoint with its adapters.
        other: the answer of --compare_with.
    """
    prompt: Prompt
    own: Answer
    other: Answer


def compare(model: Model, prompts: Sequence[Prompt], sampling: Sampling, count: int,
            arguments: argparse.Namespace) -> None:
    """Answer every prompt with both models; show the answers side by side, or write them.

    One network is in memory. It gets the weights of the second model when the first has answered.

    Args:
        model: as loading.open_model() returns it.
        prompts: as prompts.read_prompts() returns them.
        sampling: of every answer.
        count: answers to each prompt.
        arguments: the options compare_with, output, overwrite, system and batch_size.

    Raises:
        UserError: the other weights do not fit, the output holds something else, or another run
            writes it.
    """
    other = _other_weights(model, arguments.compare_with)
    with contextlib.ExitStack() as stack:
        outputs = _outputs(arguments, model, stack) if arguments.output else []
        engine = load_engine(model, arguments.batch_size, len(prompts) * count)
        own = _answers(engine, prompts, sampling, count)
        strategy = strategies(model).of_weights if arguments.compare_with == BASE else None
        with cli.quiet_stdout():
            load.load_weights(engine.model, other, strategy=strategy)
        pairs = [AnswerPair(prompt, *both) for prompt, *both in zip(
            [prompt for prompt in prompts for _ in range(count)], own,
            _answers(engine, prompts, sampling, count))]
        if outputs:
            _write(outputs, pairs, other, model, arguments.system)
        else:
            for pair in pairs:
                print(side_by_side(pair, arguments.compare_with), flush=True)
    differ = sum(pair.own.text != pair.other.text for pair in pairs)
    cli.say(f"{differ} of {len(pairs)} answers differ")


def _other_weights(model: Model, given: str) -> str:
    """Path of the weights to compare with."""
    if given == BASE:
        if not model.adapters:
            raise UserError("--compare_with base needs --adapter_checkpoint; else give the path of "
                            "the weights that training started from")
        return model.settings["load_checkpoint"]
    if not Path(given).is_dir():
        cli.existing_file(given, "the weights of --compare_with, or base with adapters")
    sidecar.require_same_model(given, model.settings)
    load.open_weights(given)  # a damaged file is found before the first answer
    return given


def _outputs(arguments: argparse.Namespace, model: Model,
             stack: contextlib.ExitStack) -> list[Path]:
    """The Markdown and the JSONL file of --output, whose suffix is left out, and their lock."""
    stem = Path(arguments.output)
    stem = stem.with_suffix("") if stem.suffix in (".md", ".jsonl") else stem
    stack.enter_context(locks.hold(stem))
    paths = [Path(f"{stem}.md"), Path(f"{stem}.jsonl")]

    def is_ours(_: Path) -> bool:
        return read_head(paths[0]).startswith(TITLE.encode())
    require_no_loss([Output(path, "a comparison of answers", is_ours) for path in paths], [
        arguments.predict_file, model.settings["load_checkpoint"], model.adapters,
        arguments.compare_with, model.tokenizer.path])
    for path in paths:
        require_overwrite(path, arguments.overwrite, lambda: False)
    return paths


def _answers(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling,
             count: int) -> list[Answer]:
    """Answers of the weights that the engine has now."""
    answers = [Answer(prompt.ids, sampling, number) for prompt in prompts
               for number in range(count)]
    return list(in_order(engine, answers, len(answers)))


def _write(outputs: Sequence[Path], pairs: Sequence[AnswerPair], other: str, model: Model,
           system: str | None) -> None:
    """Write the Markdown and the JSONL file."""
    markdown, lines = outputs
    own = " + ".join(filter(None, (model.settings["load_checkpoint"], model.adapters)))
    with atomic_file(markdown) as file:
        file.write(f"{TITLE}\n\n- A: {own}\n- B: {other}\n".encode("utf-8", "replace"))
        for number, pair in enumerate(pairs, 1):
            parts = [f"\n## {number}\n"]
            messages = with_system(pair.prompt.messages, system)
            for title, text in (*messages, ("A", pair.own.text), ("B", pair.other.text)):
                parts.append(f"\n**{title}**\n\n{fenced(text)}\n")
            file.write("".join(parts).encode("utf-8", "replace"))
    with atomic_file(lines) as file:
        for pair in pairs:
            file.write(json_line(describe_pair(pair, system)))
    cli.say(f"{markdown}, {lines}: {len(pairs)} pairs of answers")


def describe_pair(pair: AnswerPair, system: str | None) -> dict[str, Any]:
    """Both answers as a line of JSON has them."""
    return {"line": pair.prompt.line, "number": pair.own.number,
            "messages": as_json(with_system(pair.prompt.messages, system)),
            "answer": pair.own.text, "finish_reason": pair.own.finish_reason,
            "other_answer": pair.other.text, "other_finish_reason": pair.other.finish_reason}


def side_by_side(pair: AnswerPair, other: str, width: int | None = None) -> str:
    """The prompt, and below it both answers in two columns.

    Args:
        pair: the answers.
        other: title of the second column.
        width: of the terminal; None: as it is.
    """
    width = width or shutil.get_terminal_size((100, 20)).columns
    column = max(SMALLEST_COLUMN, (width - len(GAP)) // 2)
    question = [f"{role}: {text}" for role, text in pair.prompt.messages]
    columns = [wrap_cells(f"{title}\n{'-' * column}\n{text}", column)
               for title, text in (("trained", pair.own.text), (other, pair.other.text))]
    rows = [left + " " * (column - cells(left)) + GAP + right
            for left, right in zip_longest(*columns, fillvalue="")]
    return "\n".join([*wrap_cells("\n".join(question), width), "", *map(str.rstrip, rows), ""])


def cells(text: str) -> int:
    """Columns that text takes in a terminal: Chinese characters take two, accents none."""
    return sum(0 if unicodedata.combining(char) else
               2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def wrap_cells(text: str, width: int) -> list[str]:
    """Lines of at most so many columns; control characters are shown as escapes."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for char in cli.printable(paragraph.replace("\t", "    ")):
            if cells(line + char) > width:
                cut = line.rfind(" ") + 1 if line.rfind(" ") > width // 2 else len(line)
                lines.append(line[:cut].rstrip())
                line = line[cut:]
            line += char
        lines.append(line)
    return lines
