"""Print rows of a training file pair by pair, with the scored tokens marked, and check the whole file.

What is scored, and so trained, stands in [[double brackets]], in green on a terminal: an answer and the
<|user|> that ends it. Control characters are written as escapes.
"""
import sys

from mindrlhf import cli
from mindrlhf.data import mindrecord, validation
from mindrlhf.models.glm4 import template
from mindrlhf.records import SIDES

EXAMPLE = "  python -m mindrlhf.data.show dpo.mindrecord -n 3 --tokenizer tokenizer.model"
SHOWN = 10  # problems that are listed


def parser():
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.prog = "python -m mindrlhf.data.show"
    parse.add_argument("file", metavar="FILE.mindrecord", help="what the preprocessing wrote")
    parse.add_argument("-n", type=cli.positive, default=3, metavar="ROWS", help="rows to print (default: 3)")
    parse.add_argument("--tokenizer", required=True, help="tokenizer.model that made the data")
    return parse


def printable(text):
    """Text with a visible escape for each control character, so that no text can steer the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def marked(row, side, place, tokenizer):
    """One sequence as text; the tokens that are scored stand in brackets.

    Args:
        row: dict of arrays.
        side: "chosen" or "rejected".
        place: (begin, end) of the pair on that side.
        tokenizer: Glm4Tokenizer.
    """
    begin, end = place
    ids = row[f"{side}_input_ids"][begin:end].tolist()
    scored = [False, *(row[f"{side}_loss_mask"][begin:end - 1] == 1).tolist()]  # position t scores t + 1
    opening, closing = ("\033[32m[[", "]]\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    pieces, at = [], 0
    while at < len(ids):
        stop = next((n for n in range(at, len(ids)) if scored[n] != scored[at]), len(ids))
        text = printable(tokenizer.decode(ids[at:stop], show_special=True))
        pieces.append(f"{opening}{text}{closing}" if scored[at] else text)
        at = stop
    return "".join(pieces)


def print_row(number, row, tokenizer):
    """Print one row."""
    places = {side: validation.segments(row, side) for side in SIDES}
    used = [sum(end - begin for begin, end in places[side]) for side in SIDES]
    print(f"row {number}: {len(places['chosen'])} pairs, {used[0]} + {used[1]} tokens of "
          f"{len(row['chosen_labels'])}")
    for pair in range(min(map(len, places.values()))):
        print(f"  pair {pair}, number {row['pair_ids'][pair]} of the source")
        for side in SIDES:
            begin, end = places[side][pair]
            scored, logp = int(row[f"{side}_loss_mask"][begin:end].sum()), row[f"{side}_ref_logps"][pair]
            print(f"    {side}: {end - begin} tokens, {scored} scored, reference {logp:.3f} nats, "
                  f"{logp / max(scored, 1):.3f} a token")
            print(f"      {marked(row, side, places[side][pair], tokenizer)}")


def check_file(rows, sidecar, special):
    """Problems of a whole file: list of str."""
    problems, pairs, count = [], [], 0
    for count, row in enumerate(rows, 1):
        problems += [f"row {count - 1}: {problem}" for problem in validation.check_row(row, sidecar, special)]
        pairs += row["pair_ids"][row["pair_ids"] >= 0].tolist() if "pair_ids" in row else []
    if count != sidecar["rows"]:
        problems.append(f"{count} rows, {sidecar['rows']} in the sidecar")
    if len(pairs) != sidecar["pairs"]["written"]:
        problems.append(f"{len(pairs)} pairs, {sidecar['pairs']['written']} in the sidecar")
    if len(set(pairs)) != len(pairs):
        problems.append("a pair stands in the file twice")
    return problems


def main(argv=None):
    arguments = parser().parse_args(argv)
    sidecar = mindrecord.read_data_sidecar(arguments.file)
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
        raise cli.UserError(f"{arguments.file}: {'; '.join(problems[:SHOWN])}{more}. Preprocess again")
    print(f"{arguments.file}: {sidecar['rows']} rows with {sidecar['pairs']['written']} pairs, all as it "
          "should be: columns, segments, labels, loss masks, log-probs, sidecar")


if __name__ == "__main__":
    cli.run_command(main)
