"""python -m mindrlhf.card add: what came after training, for a card: the merged weights, their
score, answers.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindrlhf import cli
from mindrlhf.card import evidence, record
from mindrlhf.card.evidence import HASH
from mindrlhf.checkpoints import containers, fingerprints
from mindrlhf.cli import UserError
from mindrlhf.files import hash_file
from mindrlhf.inference import score_record
from mindrlhf.models.glm4 import load, sidecar, transform
from mindrlhf.models.glm4.weight_names import is_adapter

EXAMPLE = """\
  python -m mindrlhf.card add output/card --checkpoint merged/merged.ckpt \\
    --score output/score --answers both.jsonl"""
SHOWN = 3  # prompts whose answers a card shows
PLACES = ("checkpoint_network", "checkpoint_best")  # of a run: what may have been merged
ANSWERS = ("messages", "answer", "other_answer")  # what each line of --answers must have


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(
        "Add the merged weights, their score and answers before and after training to the card of "
        "a run, and write its documents again. What the card has of these is replaced.", EXAMPLE)
    parse.prog = "python -m mindrlhf.card add"
    parse.add_argument("folder", metavar="FOLDER", help="output/card of the run")
    parse.add_argument("--checkpoint", metavar="FILE",
                       help="what transform_checkpoint.py made of the run's weights; it is "
                            "compared with them where they are still there")
    parse.add_argument("--score", metavar="FOLDER",
                       help="the --output of run_dpo.py with run_mode score, for these weights")
    parse.add_argument("--answers", metavar="FILE",
                       help="the .jsonl that run_dpo.py --compare_with wrote, with the weights "
                            "before training as the other ones")
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    """Add what is given, and print where the card is."""
    arguments = parser().parse_args(argv)
    if not (arguments.checkpoint or arguments.score or arguments.answers):
        raise UserError("nothing to add; give --checkpoint, --score or --answers")
    folder = record.find_folder(arguments.folder)
    card = record.read_card(folder)
    with record.one_line(folder / record.RECORD):
        if arguments.checkpoint:
            add_checkpoint(card, folder, arguments.checkpoint)
        if arguments.score:
            card["score"] = read_score(arguments.score)
        require_scored_result(card)
        if arguments.answers:
            card["answers"] = describe_answers_of_both(arguments.answers)
        record.write_card(folder, card)
    cli.say(f"card: {folder / 'README.md'}, {folder / 'README_CN.md'}")


def add_checkpoint(card: dict[str, Any], folder: Path, path: str) -> None:
    """Add the merged weights, in place.

    Raises:
        UserError: they are damaged, or not those of the run.
    """
    file = load.find_checkpoint(path)
    if Path(file).is_dir():
        raise UserError(f"{path}: is a folder of shards; merge them with transform_checkpoint.py, "
                        "and give merged.ckpt")
    tensors = containers.open_tensors(cli.existing_file(file, "the merged weights"))
    identity = fingerprints.fingerprint(tensors)
    sidecar.require_recorded_weights(file, tensors, identity)
    place = _find_place(card, folder.parent, file, identity,
                        adapted="lora" in card["plan"] and not any(map(is_adapter, tensors)))
    about = evidence.read_optional(sidecar.path_beside(file))
    card["result"]["merged"] = {"file": file, "fingerprint": identity,
                                **({"weights": place} if place else {})}
    commands = [*card.get("commands", []), about.get("command")]
    card["commands"] = evidence.plain_commands(commands)


def _find_place(card: dict[str, Any], output: Path, file: str, identity: str, *,
                adapted: bool) -> str | None:
    """Which weights of the run were merged; None if that cannot be compared.

    Args:
        card: of the run.
        output: its folder.
        file: the merged weights.
        identity: their fingerprint.
        adapted: whether they are adapters merged into their base.

    Raises:
        UserError: they are of another run.
    """
    if identity in card["result"].get("shards", {}).values():
        return PLACES[0]
    base, strategy = card["base"].get("file"), str(output / "strategy")
    found = [place for place in PLACES if (output / place / "rank_0").is_dir()]
    if not found or (adapted and not (base and Path(base).is_file())):
        return None
    for place in found:
        opened = load.open_checkpoint(output / place, strategy)
        weights = {**opened.whole_tensors(), **opened.adapter_metadata()}
        if adapted:  # a sample of the values is compared
            merged = transform.items_with_adapters(weights, base, opened.files[0])
            same = sidecar.sample_of_items(merged) == sidecar.sample_fingerprint(file)
        else:
            same = identity == fingerprints.fingerprint(weights)
        if same:
            return place
    raise UserError(f"{file}: holds other weights than {output / found[0]}, which this card "
                    "describes; merge those with transform_checkpoint.py and give the result")


def read_score(place: str) -> dict[str, Any]:
    """A score as the card has it."""
    return record.describe_score(score_record.find_record(place), score_record.load(place))


def require_scored_result(card: dict[str, Any]) -> None:
    """Raise UserError if the card's score is that of other weights than its result, as far as the
    card tells: it knows the merged weights, the base, and whether adapters were trained.
    """
    score, merged = card.get("score") or {}, card["result"].get("merged")
    model = score.get("model") or {}
    scored, adapters = model.get("fingerprint"), model.get("adapters")
    if not score or (adapters and "lora" in card["plan"]):
        return
    if adapters:
        raise UserError(f"{score['file']}: is the score of adapters, and this run trained all "
                        "weights; score its result")
    if scored == card["base"].get("fingerprint"):
        raise UserError(f"{score['file']}: is the score of the weights before training, "
                        f"{str(scored)[:12]}; score the card's result")
    if merged and scored != merged["fingerprint"]:
        raise UserError(f"{score['file']}: is the score of other weights, {str(scored)[:12]}, than "
                        f"the card's result, {merged['fingerprint'][:12]}; score {merged['file']}")


def describe_answers_of_both(place: str) -> dict[str, Any]:
    """Answers before and after training as the card has them.

    Raises:
        UserError: a line is not what --compare_with writes.
    """
    path = cli.existing_file(place, "the .jsonl that run_dpo.py --compare_with wrote")
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line.decode())
            messages = [{key: str(message[key]) for key in ("role", "content")}
                        for message in entry["messages"]]
            entries.append({"messages": messages, "before": str(entry["other_answer"]),
                            "after": str(entry["answer"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path}:{number}: has no {', '.join(ANSWERS)}; give the .jsonl that "
                            "run_dpo.py --compare_with wrote") from None
    differ = sum(entry["before"] != entry["after"] for entry in entries)
    return {"file": str(path), HASH: hash_file(path), "all": len(entries), "differ": differ,
            "shown": entries[:SHOWN]}
