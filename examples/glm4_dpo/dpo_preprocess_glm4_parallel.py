"""Preference pairs to training data: tokens, masks and reference log-probs, packed into rows of a MindRecord.

Every worker tokenizes and scores its share of the pairs with the model as it is before training. The result
does not depend on the number of workers. A run that was stopped goes on where it was when started again.
"""
import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mindrlhf import cli, config
from mindrlhf.checkpoints import shards, strict
from mindrlhf.data import features, merge, mindrecord, preference, reference, summary
from mindrlhf.models.glm4 import sidecar, template

EXAMPLE = """  bash ../../scripts/msrun_launcher.sh "dpo_preprocess_glm4_parallel.py --src pairs.jsonl \\
    --dst dpo.mindrecord --config process_glm4_9b.yaml --tokenizer tokenizer.model \\
    --load_checkpoint glm4_9b.ckpt --auto_trans_ckpt True --seq_len 8192 --dataset_type cvalues" 8"""

OPTIONS = ("truncation", "on_bad_row", "identical", "duplicates", "eval_ratio", "pack")  # that shape the data


def parser():
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--src", required=True, nargs="+", metavar="PATH",
                       help="preference pairs: .jsonl or .json files, also .gz, or folders of them")
    parse.add_argument("--dst", required=True, help="training data to write, .mindrecord; its folder is made")
    parse.add_argument("--config", required=True, help="YAML with run_mode preprocess")
    parse.add_argument("--tokenizer", help="tokenizer.model of the model")
    parse.add_argument("--load_checkpoint", help="the weights to be trained: what convert_weight.py wrote")
    parse.add_argument("--auto_trans_ckpt", type=cli.boolean, metavar="True|False",
                       help="share the checkpoint, one whole file or shards, out over the cards of the parallel plan")
    parse.add_argument("--src_strategy", help="where load_checkpoint is a folder of shards, rank_0, rank_1, ...: "
                                              "output/strategy of the run that saved them")
    parse.add_argument("--seq_len", type=cli.positive, help="positions (tokens) of a row")
    parse.add_argument("--dataset_type", default="auto", choices=preference.DATASET_TYPES,
                       help="fields of a row (default: auto). cvalues: prompt, pos_resp, neg_resp; dpo: "
                            "conversations, chosen, rejected, with from and value; pairs: chosen, rejected, "
                            "with or without prompt, strings or messages with role and content")
    parse.add_argument("--truncation", default="keep_end", choices=features.TRUNCATIONS,
                       help="where prompt + answer exceed a row: the prompt loses its oldest tokens "
                            "(keep_end, the default), its newest (keep_start), or the pair is dropped. An "
                            "answer is never cut")
    parse.add_argument("--on_bad_row", default="error", choices=("error", "skip"),
                       help="a row that is no pair stops the run (default), or is left out and listed")
    parse.add_argument("--identical", default="keep", choices=("keep", "drop"),
                       help="pairs whose answers are the same (default: keep; they are reported)")
    parse.add_argument("--duplicates", default="keep", choices=("keep", "drop"),
                       help="pairs that stand there already (default: keep; they are reported)")
    parse.add_argument("--eval_ratio", type=share, default=0.0, metavar="SHARE",
                       help="share of the pairs, from 0 to below 1, that goes to DST with _eval before its "
                            "ending; no prompt is in both files (default: 0)")
    parse.add_argument("--pack", type=cli.boolean, default=True, metavar="True|False",
                       help="as many pairs to a row as fit (default: True), or one")
    return parse


def share(text):
    """argparse type for a number from 0 to below 1."""
    try:
        if 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")


def load_settings(arguments):
    settings = config.load(arguments.config, run_mode="preprocess", overrides={
        "load_checkpoint": arguments.load_checkpoint, "auto_trans_ckpt": arguments.auto_trans_ckpt,
        "src_strategy": arguments.src_strategy,
        "model.model_config.seq_length": arguments.seq_len,
        "processor.tokenizer.vocab_file": arguments.tokenizer})
    config.check_weights(settings)
    config.check_workers(settings, cli.workers())
    if config.sharded(settings) and not settings["parallel"].get("full_batch"):
        raise cli.UserError(f"{arguments.config}: preprocessing by parallel_config needs parallel.full_batch "
                            "True: every card is given the whole batch")
    if Path(arguments.dst).is_dir():
        raise cli.UserError(f"{arguments.dst}: is a folder; --dst is the name of a file")
    return settings


def read_source(arguments):
    """Pairs, and which of them are held out; what was found is said."""
    drop = [name for name, choice in ((preference.IDENTICAL, arguments.identical),
                                      (preference.DUPLICATE, arguments.duplicates)) if choice == "drop"]
    source = preference.read(arguments.src, arguments.dataset_type, drop=drop,
                             skip_bad=arguments.on_bad_row == "skip")
    told = ", told by its fields" if arguments.dataset_type == "auto" else ""
    cli.say(f"{len(source.pairs):,} pairs in {len(source.files)} file(s), "
            f"--dataset_type {source.dataset_type}{told}")
    return source, preference.held_out(source.pairs, arguments.eval_ratio)


def describe(arguments, settings, source, tokenizer):
    """(what the sidecar says of the data's origin, identity of the run: all that the data depend on)."""
    from mindrlhf import runtime
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in source.files]
    weights = strict.fingerprint(shards.open_weights(settings["load_checkpoint"], settings.get("src_strategy")))
    about = {"seq_len": settings["model"]["model_config"]["seq_length"], "template": template.VERSION,
             "dataset_type": source.dataset_type, "versions": runtime.versions(),
             "options": {name: getattr(arguments, name) for name in OPTIONS}}
    run = {**about, "data": hashes, "tokenizer": tokenizer.fingerprint, "checkpoint": weights,
           "logps_chunk_size": settings["dpo"].get("logps_chunk_size"),
           **{name: settings.get(name) for name in ("model", "runner_config", "parallel", "parallel_config")}}
    origin = {**about,
              "source": [{"file": str(file), "sha256": sha} for file, sha in zip(source.files, hashes)],
              "tokenizer": {"file": str(tokenizer.path), "sha256": tokenizer.fingerprint},
              "checkpoint": {"file": settings["load_checkpoint"], "fingerprint": weights},
              "run": hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()}
    return origin, run


def is_made(paths, run):
    """Whether all files are there already, made by the same run."""
    try:
        return all(mindrecord.read_sidecar(path).get("run") == run for path in paths)
    except cli.UserError:
        return False


def open_scorer(settings, tokenizer, *, packed):
    """The reference model with its weights."""
    from mindrlhf import runtime
    run = config.to_mindformers(settings)
    runtime.start(run, parallel=config.sharded(settings) and cli.workers() > 1)
    model = runtime.build_network(run)
    strict.load_strictly(model, settings["load_checkpoint"], strategy=settings.get("src_strategy"))
    return reference.Scorer(model, seq_len=settings["model"]["model_config"]["seq_length"], packed=packed,
                            batch_size=settings["runner_config"]["batch_size"], pad_id=tokenizer.pad_id)


class Bar:
    """The progress of all workers, on rank 0: pairs, pairs/s, real tokens/s, time left."""

    def __init__(self, parts, total):
        self.parts, self.looked = parts, time.monotonic()
        pairs, self.tokens = parts.progress()
        self.bar, self.began = cli.progress(total, "score", "pair", initial=pairs), time.monotonic()

    def show(self, at_once=False):
        """Look at what all workers have reported, twice a second at most."""
        now = time.monotonic()
        if self.bar.disable or (now - self.looked < 0.5 and not at_once):
            return
        self.looked = now
        pairs, tokens = self.parts.progress()
        speed = (tokens - self.tokens) / (now - self.began)
        self.bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        self.bar.update(pairs - self.bar.n)

    def close(self):
        """Show the last state, and leave it there."""
        self.show(at_once=True)
        self.bar.close()


def score(parts, todo, source, settings, tokenizer, arguments):
    """Make the parts in todo; on rank 0, wait until those of the others are there too."""
    bar = Bar(parts, len(source.pairs))
    scorer = open_scorer(settings, tokenizer, packed=arguments.pack) if todo else None
    writes = cli.rank() == 0 or not config.sharded(settings)
    size = reference.part_size(len(source.pairs))
    for number in todo:
        def report(pairs, tokens, number=number):
            if writes:
                parts.report(number, pairs, tokens)
            bar.show()

        part = reference.make_part(tokenizer, source.pairs[number * size:(number + 1) * size], number * size,
                                   seq_len=scorer.seq_len, truncation=arguments.truncation,
                                   score=lambda pairs, report=report: scorer(pairs, report))
        if writes:
            parts.write(number, part)
    if cli.rank() == 0:
        parts.wait(bar.show)
    bar.close()


def main(argv=None):
    arguments = parser().parse_args(argv)
    settings = load_settings(arguments)
    source, held_out = read_source(arguments)
    sidecar.check(settings.get("load_checkpoint"), settings)

    from mindrlhf import runtime
    if not config.sharded(settings):
        runtime.leave_cluster()  # workers compute alone here
    runtime.quiet()
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
    tokenizer = Glm4Tokenizer(settings["processor"]["tokenizer"]["vocab_file"])
    tokenizer.check_vocabulary(settings["model"]["model_config"]["padded_vocab_size"])
    origin, run = describe(arguments, settings, source, tokenizer)

    count = -(-len(source.pairs) // reference.part_size(len(source.pairs)))
    parts = reference.Parts(arguments.dst, count, run)
    parts.check()
    mine = range(count) if config.sharded(settings) else range(cli.rank(), count, cli.workers())
    todo = [number for number in mine if not parts.is_done(number)]
    paths = [arguments.dst] + ([merge.eval_path(arguments.dst)] if any(held_out) else [])
    if is_made(paths, origin["run"]):  # asked after the parts, which rank 0 removes when all is made
        cli.say(f"{arguments.dst}: there already, made of the same data, weights and options. Nothing to do")
        parts.remove()
        return
    score(parts, todo, source, settings, tokenizer, arguments)
    if cli.rank() == 0:
        report = merge.merge(parts, source, held_out, destination=arguments.dst, packed=arguments.pack,
                             seq_len=origin["seq_len"], pad_id=tokenizer.pad_id, sidecar=origin)
        drawn = summary.picture(f"{arguments.dst}.png", report.scored)
        parts.remove()
        cli.say(*summary.screen(report), f"  picture    {arguments.dst}.png" if drawn else
                "  picture    none: matplotlib is not installed")


if __name__ == "__main__":
    cli.run(main)
