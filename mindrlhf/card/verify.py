"""python -m mindrlhf.card verify: whether what a card says holds, claim by claim."""
from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from mindrlhf import cli, config
from mindrlhf.card import claims, record
from mindrlhf.card.claims import DIFFERS, HOLDS, UNKNOWN, Claim, Places, Verdict

EXAMPLE = """\
  python -m mindrlhf.card verify output/card
  python -m mindrlhf.card verify output/card --checkpoint merged/merged.ckpt --score \\
    score_glm4_9b.yaml"""
CLOSE = 1e-4  # by which the numbers of two scores may differ: another machine, another batch


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(
        "Recompute what a card says, from the files that it names, and print whether each claim "
        "holds, differs, or cannot be checked. The exit status is 1 if one differs.", EXAMPLE)
    parse.prog = "python -m mindrlhf.card verify"
    parse.add_argument("folder", metavar="FOLDER", help="output/card of the run")
    for name, what in (
            ("base", "the weights that training began with"),
            ("train_dataset", "the training data"), ("eval_dataset", "the held-out data"),
            ("tokenizer", "tokenizer.model"), ("checkpoint", "the merged weights"),
            ("answers", "the .jsonl with answers before and after training")):
        parse.add_argument(f"--{name}", metavar="PATH",
                           help=f"{what}, if not where the card says")
    parse.add_argument("--score", metavar="CONFIG",
                       help="score the merged weights again; a YAML with run_mode score. It needs "
                            "MindSpore")
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each claim; exit status 1 if one differs."""
    arguments = parser().parse_args(argv)
    folder = record.find_folder(arguments.folder)
    card = record.read_card(folder, sealed=False)
    places = Places(base=arguments.base, train=arguments.train_dataset,
                    held_out=arguments.eval_dataset, tokenizer=arguments.tokenizer,
                    merged=arguments.checkpoint, answers=arguments.answers)
    found: Iterable[Claim] = claims.find_claims(card, folder, places)
    if arguments.score:
        found = chain(found, [Claim("score, computed again", partial(
            score_again, card, places, arguments.score))])
    counts: Counter[str] = Counter()
    with record.one_line(folder / record.RECORD):
        for claim in found:
            verdict = claim.check()
            counts[verdict.state] += 1
            cli.say(f"{verdict.state:<{len(UNKNOWN)}}  {claim.name}: {verdict.note}")
    cli.say(f"{counts[HOLDS]} hold, {counts[DIFFERS]} differ, {counts[UNKNOWN]} cannot be checked")
    if counts[DIFFERS]:
        sys.exit(1)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep a command's own lines from the report."""
    with cli.quiet_stdout(), contextlib.redirect_stdout(io.StringIO()):
        yield


def score_again(card: dict[str, Any], places: Places, config_path: str) -> Verdict:
    """Score the merged weights on the pairs that the card names, and compare.

    Args:
        card: its sections.
        places: of files that have moved.
        config_path: YAML with run_mode score.
    """
    said, result = card.get("score"), card["result"].get("merged")
    if not said or not result:
        return Verdict(UNKNOWN, "the card has no score of merged weights; see mindrlhf.card add")
    held_out, reference = card["data"].get("held_out", {}).get("file"), said.get("reference")
    data = said["data"]["file"]
    data = places.held_out if places.held_out and data == held_out else data
    needs_reference = reference and not data.endswith(".mindrecord")
    settings = config.load_settings(config_path, run_mode="score", overrides={
        "load_checkpoint": places.merged or result["file"],
        "processor.tokenizer.vocab_file": places.tokenizer or card["tokenizer"]["file"]})
    from mindrlhf.inference import score, score_record
    with tempfile.TemporaryDirectory() as folder, _silent():
        score.score(settings, argparse.Namespace(
            score_data=data, output=folder, dataset_type=said["data"].get("dataset_type"),
            reference_checkpoint=reference["file"] if needs_reference else None,
            adapter_checkpoint=None, batch_size=None, overwrite=False))
        found = score_record.load(folder)
    pairs = {"accuracy": (said["accuracy"]["value"], found.accuracy.value),
             "margin": (said["margin"]["value"], found.margin.value)}
    text = ", ".join(f"{name} {both[1]:.6g}" for name, both in pairs.items())
    if all(math.isclose(*both, rel_tol=CLOSE, abs_tol=CLOSE) for both in pairs.values()):
        return Verdict(HOLDS, text)
    return Verdict(DIFFERS, "the card says " + ", ".join(
        f"{name} {both[0]:.6g}" for name, both in pairs.items()) + f"; computed: {text}")
