"""Print rows of a training file group by group, with the scored tokens marked, and check all rows.

A group is a prompt with its distinct answers and the pairs that compare them. Scored tokens, on
which the model is trained, are in [[double brackets]], green on a terminal: an answer and the
<|user|> that ends it. Control characters are printed as escapes. With --json, each pair is a JSON
object on a line of its own instead: pair (its row in the source, from 0), prompt_ids, chosen_ids,
rejected_ids (the scored tokens), reference_chosen_logps and reference_rejected_logps (nats).
"""
from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mindrlhf import cli
from mindrlhf.data import mindrecord, validation
from mindrlhf.data.features import ComparedPair
from mindrlhf.models.glm4 import template
from mindrlhf.records import SIDES

if TYPE_CHECKING:
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

EXAMPLE = "  python -m mindrlhf.data.show dpo.mindrecord -n 3 --tokenizer tokenizer.model"
SHOWN = 10  # problems that are listed


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.prog = "python -m mindrlhf.data.show"
    parse.add_argument("file", metavar="FILE.mindrecord", help="output of the preprocessing")
    parse.add_argument("-n", type=cli.positive, default=3, metavar="ROWS",
                       help="rows to print (default: 3)")
    parse.add_argument("--tokenizer", help="tokenizer.model that made the data; not needed with "
                                           "--json, which then checks nothing")
    parse.add_argument("--json", action="store_true", help="print all pairs as JSON lines")
    return parse


def print_row(number: int, row: Mapping[str, np.ndarray], tokenizer: Glm4Tokenizer) -> None:
    """Print one row.

    Args:
        number: of the row in the file.
        row: its columns.
        tokenizer: that made the data.
    """
    answers = validation.read_answers(row)
    pairs = _pairs_of(row)
    opening, closing = ("\033[32m[[", "]]\033[0m") if sys.stdout.isatty() else ("[[", "]]")

    def text(ids: Sequence[int]) -> str:
        return cli.printable(tokenizer.decode(ids, show_special=True))

    print(f"row {number}: {len(pairs)} pairs of {len(answers)} answers, "
          f"{(row['group_ids'] > 0).sum()} tokens of {len(row['group_ids'])}")
    for place, answer in enumerate(answers):
        if not place or answers[place - 1].group != answer.group:
            print(f"  group {answer.group}: prompt of {len(answer.prompt)} tokens")
            print(f"    {text(answer.prompt)}")
        logp, scored = float(row["reference_logps"][place]), len(answer.response)
        roles = [f"{side} in {pair.number}" for pair in pairs for side in SIDES
                 if getattr(pair, side) == place]
        print(f"    answer {place}: {scored} scored, reference {logp:.3f} nats, "
              f"{logp / scored:.3f} per token, {', '.join(roles)}")
        print(f"      {opening}{text(answer.response)}{closing}")


def print_pairs(row: Mapping[str, np.ndarray]) -> None:
    """Print the pairs of a row as JSON lines."""
    answers, logps = validation.read_answers(row), row["reference_logps"].tolist()
    for pair in _pairs_of(row):
        print(json.dumps({
            "pair": pair.number, "prompt_ids": answers[pair.chosen].prompt,
            **{f"{side}_ids": answers[getattr(pair, side)].response for side in SIDES},
            **{f"reference_{side}_logps": logps[getattr(pair, side)] for side in SIDES}}))


def _pairs_of(row: Mapping[str, np.ndarray]) -> list[ComparedPair]:
    """The pairs of a row; their answers are counted within the row."""
    columns = (row[name].tolist() for name in (*SIDES, "pair_ids"))
    return [pair for pair in map(ComparedPair, *columns) if pair.number >= 0]


def check_file(rows: Iterable[Mapping[str, np.ndarray]], sidecar: Mapping[str, Any],
               special: Mapping[str, int]) -> list[str]:
    """Find the problems of a file.

    Args:
        rows: all of its rows.
        sidecar: of the file.
        special: special token -> id.
    """
    problems: list[str] = []
    pair_ids: list[int] = []
    count = 0
    for count, row in enumerate(rows, 1):
        problems += [f"row {count - 1}: {problem}"
                     for problem in validation.check_row(row, sidecar, special)]
        if "pair_ids" in row:
            pair_ids += row["pair_ids"][row["pair_ids"] >= 0].tolist()
    if count != sidecar["rows"]:
        problems.append(f"{count} rows, {sidecar['rows']} in the sidecar")
    if len(pair_ids) != sidecar["pairs"]["written"]:
        problems.append(f"{len(pair_ids)} pairs, {sidecar['pairs']['written']} in the sidecar")
    if len(set(pair_ids)) != len(pair_ids):
        problems.append("a pair occurs twice in the file")
    return problems


def main(argv: Sequence[str] | None = None) -> None:
    """Print some rows, and check the file."""
    parse = parser()
    arguments = parse.parse_args(argv)
    if not (arguments.tokenizer or arguments.json):
        parse.error("--tokenizer is needed unless --json is given")
    sidecar = mindrecord.read_data_sidecar(arguments.file)
    mindrecord.require_unchanged(arguments.file, sidecar)
    from mindrlhf import runtime
    runtime.quiet_mindformers()
    if arguments.json:
        for row in mindrecord.read_rows(arguments.file):
            print_pairs(row)
        return
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
    tokenizer = Glm4Tokenizer(arguments.tokenizer)
    mindrecord.require_made_for(arguments.file, sidecar, seq_len=None, template=template.VERSION,
                                tokenizer=tokenizer.fingerprint, checkpoint=None)
    for number, row in zip(range(arguments.n), mindrecord.read_rows(arguments.file)):
        if not validation.check_shapes(row, sidecar):
            print_row(number, row, tokenizer)
    problems = check_file(mindrecord.read_rows(arguments.file), sidecar, tokenizer.special)
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise cli.UserError(f"{arguments.file}: {'; '.join(problems[:SHOWN])}{more}. Preprocess "
                            "again")
    print(f"{arguments.file}: {sidecar['rows']} rows with {sidecar['pairs']['written']} pairs are "
          "valid: columns, groups, answers, labels, positions, log-probs, sidecar")


if __name__ == "__main__":
    cli.run_command(main)
