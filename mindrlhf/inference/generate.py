"""run_mode predict: loads the model once and answers a message, a file, or a person."""
from __future__ import annotations

import argparse

from mindrlhf.cli import UserError
from mindrlhf.inference import answer_file, chat, compare
from mindrlhf.inference.engine import Answer, require_room
from mindrlhf.inference.loading import Model, load_engine, open_model
from mindrlhf.inference.options import require_sampling, sampling_from
from mindrlhf.inference.prompts import Prompt, read_prompts, with_system
from mindrlhf.inference.sampling import Sampling
from mindrlhf.models.glm4 import template
from mindrlhf.parallel import Settings


def predict(settings: Settings, arguments: argparse.Namespace) -> None:
    """Do what the options of options.add_prediction() say.

    Args:
        settings: as config.load_settings returns them, of run_mode predict.
        arguments: the options, with adapter_checkpoint and overwrite.

    Raises:
        UserError: options, prompts, weights, adapters and YAML do not match.
    """
    _require_one_task(arguments)
    sampling = sampling_from(settings, arguments)
    count = arguments.num_answers or 1
    require_sampling(sampling, count)
    model = open_model(settings, arguments.adapter_checkpoint)
    if arguments.chat:
        chat.require_terminal_editor()
        engine = load_engine(model, 1)
        chat.converse(engine, sampling, arguments.system)
        return
    prompts = _prompts(model, arguments)
    if arguments.compare_with:
        compare.compare(model, prompts, sampling, count, arguments)
    elif arguments.predict_file:
        answer_file.answer_all(model, prompts, sampling, count, arguments)
    else:
        _print_answers(model, prompts[0], sampling, count, arguments.batch_size)


def _require_one_task(arguments: argparse.Namespace) -> None:
    """Raise UserError unless the options name one task, and nothing that it has no use for."""
    given = [f"--{name}" for name in ("predict_data", "predict_file", "chat")
             if getattr(arguments, name) not in (None, False)]
    if not given:
        raise UserError("run_mode predict needs --predict_data TEXT, --predict_file FILE or --chat")
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")
    unused = [f"--{name}" for name in ("num_answers", "compare_with", "output", "batch_size")
              if arguments.chat and getattr(arguments, name)]
    if arguments.output and arguments.predict_data is not None and not arguments.compare_with:
        unused = ["--output"]
    if unused:
        raise UserError(f"{given[0]} takes no {unused[0]}; leave it out")


def _prompts(model: Model, arguments: argparse.Namespace) -> list[Prompt]:
    """The prompts of --predict_file or --predict_data."""
    if arguments.predict_file:
        return read_prompts(arguments.predict_file, model.tokenizer, model.settings,
                            arguments.system)
    messages = (("user", " ".join(arguments.predict_data)),)
    ids = template.prompt_ids(model.tokenizer, with_system(messages, arguments.system))
    require_room(ids, model.settings, "--predict_data")
    return [Prompt(1, messages, ids)]


def _print_answers(model: Model, prompt: Prompt, sampling: Sampling, count: int,
                   batch_size: int | None) -> None:
    """Print the answer to one message; several are numbered."""
    engine = load_engine(model, batch_size, count)
    answers = [Answer(prompt.ids, sampling, number) for number in range(count)]
    for _ in engine.run(answers):
        pass
    for answer in answers:
        print(answer.text if count == 1 else f"[{answer.number + 1}] {answer.text}", flush=True)
