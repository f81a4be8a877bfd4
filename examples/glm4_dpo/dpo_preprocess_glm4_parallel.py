"""Preference pairs to training data: tokens, masks and reference log-probs, packed into rows of a MindRecord.

Every worker scores its share of the pairs with the model as it is before training. The result does not depend on the
number of workers; a run that was stopped goes on where it was.
"""
import hashlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mindrlhf import checkpoint, cli, config
from mindrlhf.data import mindrecord, packing, preference, reference
from mindrlhf.models.glm4 import sidecar, template

EXAMPLE = """  bash ../../scripts/msrun_launcher.sh "dpo_preprocess_glm4_parallel.py --src pairs.jsonl --dst dpo.mindrecord \\
    --config process_glm4_9b.yaml --tokenizer tokenizer.model --load_checkpoint glm4_9b.ckpt \\
    --auto_trans_ckpt True --seq_len 8192 --dataset_type cvalues" 8"""


def parser():
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--src", required=True, help="preference pairs, JSON lines")
    parse.add_argument("--dst", required=True, help="training data to write, .mindrecord; its folder is made")
    parse.add_argument("--config", required=True, help="YAML with run_mode preprocess")
    parse.add_argument("--tokenizer", help="tokenizer.model of the model")
    parse.add_argument("--load_checkpoint", help="the weights to be trained: what convert_weight.py wrote")
    parse.add_argument("--auto_trans_ckpt", type=cli.boolean, metavar="True|False",
                       help="share one whole checkpoint out over the cards of a model-parallel plan")
    parse.add_argument("--seq_len", type=cli.positive, help="positions (tokens) of a row")
    parse.add_argument("--dataset_type", default="cvalues", choices=preference.DATASET_TYPES,
                       help="fields of a row (default: cvalues = prompt, pos_resp, neg_resp)")
    return parse


def load_settings(arguments):
    return config.load(arguments.config, run_mode="preprocess", overrides={
        "load_checkpoint": arguments.load_checkpoint, "auto_trans_ckpt": arguments.auto_trans_ckpt,
        "model.model_config.seq_length": arguments.seq_len, "processor.tokenizer.vocab_file": arguments.tokenizer})


def merge(parts, arguments, identity, seq_len, pad_id):
    """Pack the scored pairs of all parts into the rows of the final file, and say what came of them."""
    collected = list(parts.read())
    pairs = [pair for part in collected for pair in reference.split_tokens(part)]
    joined = {name: np.concatenate([part[name] for part in collected])
              for name in ("pair_ids", "lengths", "logps", "cut", "dropped")}
    dropped, read = joined["dropped"], len(pairs) + len(joined["dropped"])
    if not pairs:
        raise cli.UserError(f"{arguments.src}: no pair fits into {seq_len} tokens; raise --seq_len")
    lengths = joined["lengths"][:, :1] + joined["lengths"][:, 1:]  # tokens of prompt + response, (N, 2)
    rows = packing.pack(lengths, seq_len)
    width = max(map(len, rows))
    tokens = int(lengths.sum())
    counts = {"read": read, "written": len(pairs), "dropped": {"an answer longer than a row": len(dropped)},
              "prompts shortened": int((joined["cut"] > 0).sum())}
    mindrecord.write(
        arguments.dst, cli_rows(rows, pairs, joined, seq_len, width, pad_id), seq_len=seq_len, width=width,
        sidecar={"rows": len(rows), "pairs_per_row": width, "pairs": counts, "tokens": tokens, **identity})
    per_token = joined["logps"].sum(0) / joined["lengths"][:, 1:].sum(0)
    cli.say(f"{arguments.dst}: {len(pairs)} of {read} pairs in {len(rows)} rows of {seq_len}, at most {width} a row",
            f"  dropped: {len(dropped)}" + (f", an answer longer than a row (pairs {dropped[:5].tolist()}, counted from 0)"
                                            if len(dropped) else ""),
            f"  prompts shortened to fit: {counts['prompts shortened']}",
            f"  tokens: {tokens}, {tokens / (2 * len(rows) * seq_len):.1%} of the rows' room; longest side of a pair: "
            f"median {np.median(lengths.max(1)):.0f}, longest {lengths.max()}",
            f"  reference log-prob per token: chosen {per_token[0]:.4f}, rejected {per_token[1]:.4f} nats")


def cli_rows(rows, pairs, joined, seq_len, width, pad_id):
    """The final rows, made one at a time."""
    bar = cli.progress(len(rows), "write", "row")
    for row in rows:
        members = [reference.TokenPair(*map(list, (pairs[n].prompt, pairs[n].chosen, pairs[n].rejected))) for n in row]
        yield mindrecord.make_row(members, joined["logps"][row], joined["pair_ids"][row],
                                  seq_len=seq_len, width=width, pad_id=pad_id)
        bar.update()
    bar.close()


def main(argv=None):
    arguments = parser().parse_args(argv)
    settings = load_settings(arguments)
    if Path(arguments.dst).is_dir():
        raise cli.UserError(f"{arguments.dst}: is a folder; --dst is the name of a file")
    source = preference.read_cvalues(arguments.src)
    sidecar.check(settings.get("load_checkpoint"), settings)

    from mindrlhf import backend
    backend.leave_cluster()  # workers compute alone here
    backend.quiet()
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
    seq_len = settings["model"]["model_config"]["seq_length"]
    tokenizer = Glm4Tokenizer(settings["processor"]["tokenizer"]["vocab_file"])
    tokenizer.check_vocabulary(settings["model"]["model_config"]["padded_vocab_size"])

    run = config.to_mindformers(settings)
    backend.start(run, parallel=False)
    model = backend.build_network(run)
    weights = checkpoint.load_strictly(model, settings.get("load_checkpoint"))
    batch_size = settings["runner_config"]["batch_size"]
    scorer = reference.Scorer(model, seq_len=seq_len, batch_size=batch_size, pad_id=tokenizer.pad_id)

    identity = {"source": {"file": str(arguments.src), "sha256": hashlib.sha256(Path(arguments.src).read_bytes()).hexdigest()},
                "dataset_type": arguments.dataset_type, "seq_len": seq_len, "template": template.VERSION,
                "tokenizer": {"file": settings["processor"]["tokenizer"]["vocab_file"], "sha256": tokenizer.fingerprint},
                "checkpoint": {"file": settings["load_checkpoint"], "fingerprint": checkpoint.fingerprint(weights)},
                "versions": backend.versions()}
    size = reference.part_size(len(source))
    parts = reference.Parts(arguments.dst, -(-len(source) // size), {**identity, "batch_size": batch_size})

    bar = cli.progress(len(source), "score", "pair")

    def show(done):
        bar.update(min(done * size, len(source)) - bar.n)

    for number in range(cli.rank(), parts.count, cli.workers()):
        if not parts.is_done(number):
            begin = number * size
            parts.write(number, reference.make_part(tokenizer, source[begin:begin + size], begin, seq_len=seq_len,
                                                    score=scorer))
        if cli.rank() == 0:
            show(parts.done())
    if cli.rank() == 0:
        parts.wait(show)
        bar.close()
        merge(parts, arguments, identity, seq_len, tokenizer.pad_id)
        parts.remove()


if __name__ == "__main__":
    cli.run(main)
