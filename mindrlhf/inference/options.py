"""Options of the commands that generate answers, and of run_mode score."""
from __future__ import annotations

import argparse

from mindrlhf import cli
from mindrlhf.data import preference
from mindrlhf.inference.sampling import Sampling, sampling_of
from mindrlhf.parallel import Settings


def temperature(text: str) -> float:
    """argparse type for a temperature: 0, or a number above."""
    return _number(text, 0, 100, "0 (greedy decoding) or a number above, up to 100")


def top_p(text: str) -> float:
    """argparse type for a share of the probability."""
    return _number(text, 1e-6, 1, "a number above 0, up to 1")


def repetition_penalty(text: str) -> float:
    """argparse type for a repetition penalty."""
    return _number(text, 1e-6, 100, "a number above 0, up to 100")


def top_k(text: str) -> int:
    """argparse type for a number of tokens; 0 means all."""
    return 0 if text == "0" else cli.positive(text)


def random_seed(text: str) -> int:
    """argparse type for a seed."""
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0 and at most 18 "
                                         f"digits, got {cli.shown(text)}")
    return int(text)


def _number(text: str, low: float, high: float, what: str) -> float:
    """A number from low to high."""
    try:
        if low <= float(text) <= high:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected {what}, got {cli.shown(text)}")


def add_sampling(parse: argparse.ArgumentParser) -> None:
    """Add the options of one answer. What is not given follows the YAML."""
    parse.add_argument("--max_new_tokens", type=cli.positive, metavar="N",
                       help="predict: longest answer, in tokens (YAML: max_decode_length)")
    parse.add_argument("--temperature", type=temperature, metavar="T",
                       help="predict: sample, with logits divided by T; 0: greedy decoding")
    parse.add_argument("--top_p", type=top_p, metavar="P",
                       help="predict: sample from the likeliest tokens that make up P")
    parse.add_argument("--top_k", type=top_k, metavar="K",
                       help="predict: sample from the K likeliest tokens; 0: from all")
    parse.add_argument("--repetition_penalty", type=repetition_penalty, metavar="R",
                       help="predict: above 1, tokens of prompt and answer become less likely")
    parse.add_argument("--seed", type=random_seed, metavar="N",
                       help="predict: seed of sampling (YAML: seed)")
    parse.add_argument("--system", metavar="TEXT",
                       help="predict: system prompt of conversations that have none")
    parse.add_argument("--batch_size", type=cli.positive, metavar="N",
                       help="predict: answers generated at once (YAML: batch_size); score: rows "
                            "computed at once (YAML: runner_config.batch_size)")


def add_prediction(parse: argparse.ArgumentParser) -> None:
    """Add the options of run_mode predict."""
    parse.add_argument("--predict_data", metavar="TEXT", nargs="+",
                       help="predict: the user's message; its words need no quotes")
    parse.add_argument("--predict_file", metavar="FILE",
                       help="predict: many prompts: .txt with one a line, or rows of JSON with "
                            "prompt, messages or the fields of a data set")
    parse.add_argument("--output", metavar="PATH",
                       help="predict: where the answers to --predict_file go, as JSON lines; an "
                            "interrupted run goes on (default: stdout); score: folder for the "
                            "results (default: ./output/score)")
    parse.add_argument("--num_answers", type=cli.positive, metavar="N",
                       help="predict: answers to each prompt, sampled (default: 1)")
    parse.add_argument("--chat", action="store_true",
                       help="predict: talk to the model in the terminal")
    parse.add_argument("--compare_with", metavar="PATH",
                       help="predict: answer with these weights too; base: load_checkpoint "
                            "without its adapters")
    add_sampling(parse)


def add_scoring(parse: argparse.ArgumentParser) -> None:
    """Add the options of run_mode score; it shares SHARED with run_mode predict."""
    parse.add_argument("--score_data", metavar="PATH",
                       help="score: a .mindrecord from preprocessing, preference pairs of any "
                            "--dataset_type, or multiple choice as in CValues-Responsibility-MC")
    parse.add_argument("--reference_checkpoint", metavar="PATH",
                       help="score: weights for the reference log-probs of pairs that are no "
                            ".mindrecord; base: load_checkpoint without its adapters (default: "
                            "base if there are adapters)")
    parse.add_argument("--dataset_type", choices=preference.DATASET_TYPES, metavar="TYPE",
                       help="score: format of the pairs, as in preprocessing (default: auto)")


# run_mode -> what adds its options; options of two of them
ADDED = {"predict": add_prediction, "score": add_scoring}
SHARED = {"output": ("predict", "score"), "batch_size": ("predict", "score")}


def require_options_of(mode: str, arguments: argparse.Namespace) -> None:
    """Raise UserError if an option of another run_mode is given.

    Args:
        mode: run_mode of the YAML.
        arguments: of the command line.
    """
    for other, add in ADDED.items():
        parse = argparse.ArgumentParser()
        add(parse)
        for name, default in vars(parse.parse_args([])).items():
            modes = SHARED.get(name, (other,))
            if mode not in modes and getattr(arguments, name) != default:
                raise cli.UserError(
                    f"--{name} is for run_mode {' and '.join(modes)}, and the YAML's is {mode}; "
                    "leave it out, or give another --config")


def sampling_from(settings: Settings, arguments: argparse.Namespace) -> Sampling:
    """The sampling that the YAML and the options of add_sampling() give."""
    given = vars(arguments)
    return sampling_of(settings, {name: given[name] for name in Sampling._fields})


def require_sampling(sampling: Sampling, num_answers: int) -> None:
    """Raise UserError if several answers would all be the same."""
    if num_answers > 1 and sampling.is_greedy:
        cure = "--temperature 1" if sampling.temperature == 0 else "--top_k 0"
        raise cli.UserError(f"--num_answers {num_answers} needs sampling, because greedy answers "
                            f"are all the same; add {cure}")
