"""Answers to a file of prompts, as JSON lines in the order of the prompts.

The answers of an unfinished run are in OUTPUT.part, and what they depend on is in OUTPUT.json. The
same command continues after the last complete line; when all are there, the file gets its name.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mindrlhf import cli, config, locks
from mindrlhf.checkpoints import fingerprints
from mindrlhf.cli import UserError
from mindrlhf.inference.engine import Answer, Engine, room_of
from mindrlhf.inference.loading import Model, load_engine, strategies
from mindrlhf.inference.prompts import Prompt, as_json, with_system
from mindrlhf.inference.sampling import Sampling
from mindrlhf.json_files import read_json, write_json
from mindrlhf.models.glm4 import load, template
from mindrlhf.outputs import Output, require_no_loss

KEY = "answers"  # of OUTPUT.json: what the answers depend on


def answer_all(model: Model, prompts: Sequence[Prompt], sampling: Sampling, count: int,
               arguments: argparse.Namespace) -> None:
    """Write an answer to every prompt.

    Args:
        model: as generate.open_model() returns it.
        prompts: as prompts.read_prompts() returns them.
        sampling: of every answer.
        count: answers to each prompt.
        arguments: the options predict_file, output, overwrite, system and batch_size.

    Raises:
        UserError: the output cannot be written, holds something else, or another run writes it.
    """
    total = len(prompts) * count
    with contextlib.ExitStack() as stack:
        if arguments.output:
            stack.enter_context(locks.hold(arguments.output))
            inputs = [arguments.predict_file, model.settings.get("load_checkpoint"),
                      model.adapters, model.tokenizer.path]
            output = AnswerFile(arguments.output, describe_answers(model, prompts, sampling, count),
                                total, inputs, overwrite=arguments.overwrite)
            done = stack.enter_context(output)
            if done >= total:
                output.finish()
                cli.say(f"{arguments.output}: has all {total} answers already")
                return
            write = output.write
        else:
            done, write = 0, _print_line
        left = [(prompt, number) for prompt in prompts for number in range(count)][done:]
        engine = load_engine(model, arguments.batch_size, len(left))
        answers = [Answer(prompt.ids, sampling, number) for prompt, number in left]
        for answer, (prompt, _) in zip(in_order(engine, answers, total, done), left):
            write(describe_answer(prompt, answer, arguments.system))
        if arguments.output:
            output.finish()
            cli.say(f"{arguments.output}: {total} answers, {engine.generated} new tokens")


def in_order(engine: Engine, answers: Sequence[Answer], total: int,
             done: int = 0) -> Iterator[Answer]:
    """Generate answers in batches; yield them in their order, with a progress bar.

    Args:
        engine: generates them.
        answers: not submitted yet.
        total: their number, including those done before.
        done: number of those.
    """
    place = 0
    with cli.progress_bar(total, "answers", "answer", initial=done) as bar:
        for _ in engine.run(answers):
            bar.update()
            seconds = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{engine.generated / seconds:.0f} tokens/s" if seconds else "",
                                refresh=False)
            while place < len(answers) and answers[place].finish_reason:
                yield answers[place]
                place += 1


def describe_answer(prompt: Prompt, answer: Answer, system: str | None) -> dict[str, Any]:
    """An answer as a line of JSON has it."""
    return {"line": prompt.line, "number": answer.number,
            "messages": as_json(with_system(prompt.messages, system)), "answer": answer.text,
            "finish_reason": answer.finish_reason, "tokens": len(answer.tokens)}


def describe_answers(model: Model, prompts: Sequence[Prompt], sampling: Sampling,
                     count: int) -> dict[str, Any]:
    """What the answers to prompts depend on, for OUTPUT.json."""
    settings, (of_weights, of_adapters) = model.settings, strategies(model)
    config.require_weights(settings)
    weights = load.open_weights(settings["load_checkpoint"], of_weights)
    adapters = load.open_adapters(model.adapters, of_adapters) if model.adapters else {}
    text = json.dumps([[prompt.line, prompt.ids] for prompt in prompts])
    return {
        "prompts": hashlib.sha256(text.encode()).hexdigest()[:16],
        "number of prompts": len(prompts),
        "weights": fingerprints.fingerprint(weights, sample=True)[:16],
        "adapters": fingerprints.fingerprint(adapters, sample=True)[:16] if adapters else None,
        "tokenizer": model.tokenizer.fingerprint[:16], "template": template.VERSION,
        "tokens of prompt and answer": room_of(settings), "answers to each prompt": count,
        "compute_dtype": settings["model"]["model_config"].get("compute_dtype"),
        **sampling._asdict()}


def json_line(content: Mapping[str, Any]) -> bytes:
    """A line of JSON in UTF-8; a lone surrogate is escaped."""
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _print_line(content: Mapping[str, Any]) -> None:
    """Print a line of JSON to stdout."""
    print(json_line(content).decode(), end="", flush=True)


class AnswerFile:
    """The file of --output, whose lock is held. As a context manager, it returns the number of
    answers that it has.

    Args:
        path: of the file.
        made_of: as describe_answers() returns it.
        total: number of all answers.
        inputs: files that the command reads.
        overwrite: replace answers that were made from something else.

    Raises:
        UserError: the path holds something else.
    """

    def __init__(self, path: str | Path, made_of: Mapping[str, Any], total: int,
                 inputs: Iterable[str | Path | None], *, overwrite: bool) -> None:
        self.path, self.made_of, self.total = Path(path), dict(made_of), total
        self.part, self.sidecar = Path(f"{path}.part"), Path(f"{path}.json")
        self.file: BinaryIO | None = None
        require_no_loss([_output(place, self.sidecar)
                         for place in (self.path, self.part, self.sidecar)], inputs)
        found = [place for place in (self.path, self.part) if os.path.lexists(place)]
        if not found:
            return
        before = read_json(self.sidecar)[KEY]
        changed = [f"{name} was {before.get(name)}, is {value}"
                   for name, value in self.made_of.items() if before.get(name) != value]
        lines = self.path.read_bytes().count(b"\n") if self.path.exists() else total
        if lines != total:
            changed.append(f"it has {lines} lines of {total}")
        if changed and not overwrite:
            raise UserError(f"{found[0]}: holds answers made otherwise: {changed[0]}; replace them "
                            "with --overwrite, or give another --output")
        if changed:
            for place in found:
                place.unlink()

    def __enter__(self) -> int:
        if self.path.exists():
            return self.total
        try:
            self.path.absolute().parent.mkdir(parents=True, exist_ok=True)
            file = open(self.part, "a+b")  # closed in __exit__
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); give another "
                            "--output") from None
        self.file = file
        write_json(self.sidecar, {KEY: self.made_of})
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)  # a line that a kill cut short is made again
        return content.count(b"\n")

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def write(self, content: Mapping[str, Any]) -> None:
        """Add an answer; it is in the file when the call returns."""
        assert self.file
        self.file.write(json_line(content))
        self.file.flush()

    def finish(self) -> None:
        """All answers are there: give the file its name, unless it has it."""
        if self.file:
            os.replace(self.part, self.path)


def _output(path: Path, sidecar: Path) -> Output:
    """A file that may be replaced, because its sidecar says that this command wrote it."""
    def is_ours(_: Path) -> bool:
        try:
            return isinstance(read_json(sidecar).get(KEY), dict)
        except UserError:
            return False
    return Output(path, "a file of answers", is_ours)
