"""Print rows of a training file pair by pair, with the scored tokens marked, and check all rows.

Scored tokens, on which the model is trained, are in [[double brackets]], green on a terminal: an
answer and the <|user|> that ends it. Control characters are printed as escapes.
"""
from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mindrlhf import cli
from mindrlhf.data import mindrecord, validation
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
    parse.add_argument("--tokenizer", required=True, help="tokenizer.model that made the data")
    return parse


def marked(row: Mapping[str, np.ndarray], side: str, segment: validation.Segment,
           tokenizer: Glm4Tokenizer) -> str:
    """Text of one sequence, with scored tokens in brackets.

    Args:
        row: its columns.
        side: "chosen" or "rejected".
        segment: of the pair on that side.
        tokenizer: that made the data.
    """
    begin, end = segment
    ids = row[f"{side}_input_ids"][begin:end].tolist()
    scored = [False, *(row[f"{side}_loss_mask"][begin:end - 1] == 1).tolist()]  # t scores t + 1
    opening, closing = ("\033[32m[[", "]]\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    pieces, at = [], 0
    while at < len(ids):
        stop = next((n for n in range(at, len(ids)) if scored[n] != scored[at]), len(ids))
        text = cli.printable(tokenizer.decode(ids[at:stop], show_special=True))
        pieces.append(f"{opening}{text}{closing}" if scored[at] else text)
        at = stop
    return "".join(pieces)


def print_row(number: int, row: Mapping[str, np.ndarray], tokenizer: Glm4Tokenizer) -> None:
    """Print one row.

    Args:
        number: of the row in the file.
        row: its columns.
        tokenizer: that made the data.
    """
    places = {side: validation.segments(row, side) for side in SIDES}
    used = [sum(end - begin for begin, end in places[side]) for side in SIDES]
    print(f"row {number}: {len(places['chosen'])} pairs, {used[0]} + {used[1]} tokens of "
          f"{len(row['chosen_labels'])}")
    for pair in range(min(map(len, places.values()))):
        print(f"  pair {pair}, number {row['pair_ids'][pair]} of the source")
        for side in SIDES:
            begin, end = places[side][pair]
            scored = int(row[f"{side}_loss_mask"][begin:end].sum())
            logp = row[f"{side}_ref_logps"][pair]
            print(f"    {side}: {end - begin} tokens, {scored} scored, reference {logp:.3f} nats, "
                  f"{logp / max(scored, 1):.3f} per token")
            print(f"      {marked(row, side, places[side][pair], tokenizer)}")


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
    arguments = parser().parse_args(argv)
    sidecar = mindrecord.read_data_sidecar(arguments.file)
    mindrecord.require_unchanged(arguments.file, sidecar)
    from mindrlhf import runtime
    runtime.quiet_mindformers()
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
          "valid: columns, segments, labels, loss masks, log-probs, sidecar")


if __name__ == "__main__":
    cli.run_command(main)
