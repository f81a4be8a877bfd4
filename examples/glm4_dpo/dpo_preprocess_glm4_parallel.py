"""Turn preference pairs into training data: rows of packed tokens, masks and reference log-probs.

Each worker tokenizes its share of the pairs and scores it with the weights as they are before
training. The result, a MindRecord, does not depend on the number of workers. To resume a stopped
run, repeat its command.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mindrlhf import cli
from mindrlhf.data import features, formats, preference, preprocess

EXAMPLE = """  bash ../../scripts/msrun_launcher.sh "dpo_preprocess_glm4_parallel.py \\
    --src pairs.jsonl --dst dpo.mindrecord --config process_glm4_9b.yaml \\
    --tokenizer tokenizer.model --load_checkpoint glm4_9b.ckpt --auto_trans_ckpt True \\
    --seq_len 8192 --dataset_type cvalues" 8"""


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(__doc__, EXAMPLE)
    add = parse.add_argument
    add("--src", required=True, nargs="+", metavar="PATH",
        help="preference pairs: .jsonl, .json or .csv files, also .gz or .zst, .parquet files, "
             "folders of them, or a folder that datasets' save_to_disk wrote")
    add("--dst", required=True,
        help="training data to write, .mindrecord; its folder is created")
    add("--config", required=True, help="YAML with run_mode preprocess")
    add("--tokenizer", help="tokenizer.model of the model")
    add("--load_checkpoint", help="the weights to train, as written by convert_weight.py")
    add("--auto_trans_ckpt", type=cli.boolean, metavar="True|False",
        help="load the checkpoint, one file or shards of any plan, into the shards of this plan")
    add("--src_strategy",
        help="if load_checkpoint is a folder of shards (rank_0, rank_1, ...): output/strategy of "
             "the run that saved them")
    add("--seq_len", type=cli.positive, help="positions (tokens) of a row")
    add("--dataset_type", default="auto", choices=preference.DATASET_TYPES,
        help="fields of a row (default: auto, from the first row). "
             f"{formats.describe_fields(formats.FORMATS)}. Any of them may have system and history "
             "beside; the tutorial explains them all")
    add("--truncation", default="keep_end", choices=features.TRUNCATIONS,
        help="if a prompt and two answers exceed a row: cut the oldest tokens of the prompt "
             "(keep_end, the default) or the newest (keep_start), or drop the pair. Answers are "
             "never cut")
    add("--on_bad_row", default="error", choices=("error", "skip"),
        help="a row that is not a pair stops the run (default), or is skipped and listed")
    add("--identical", default="keep", choices=("keep", "drop"),
        help="pairs with two equal answers (default: keep; they are reported)")
    add("--duplicates", default="keep", choices=("keep", "drop"),
        help="repetitions of a pair (default: keep; they are reported)")
    add("--eval_ratio", type=cli.share, default=0.0, metavar="SHARE",
        help="share of the pairs, from 0 to below 1, to write to DST with _eval before its suffix; "
             "no prompt is in both files (default: 0)")
    add("--share", type=cli.boolean, default=True, metavar="True|False",
        help="compute a prompt and an answer that several pairs have in common once (default: "
             "True), or once for each pair")
    add("--pack", type=cli.boolean, default=True, metavar="True|False",
        help="fill a row with as many prompts and their pairs as fit (default: True), or take one")
    add("--overwrite", action="store_true",
        help="replace training data at DST that were made from other inputs")
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    """Preprocess, and print a summary."""
    arguments = parser().parse_args(argv)
    given = {name: getattr(arguments, name) for name in preprocess.OPTION_NAMES}
    preprocess.preprocess(preprocess.Options(**given), arguments.config, {
        "load_checkpoint": arguments.load_checkpoint, "auto_trans_ckpt": arguments.auto_trans_ckpt,
        "src_strategy": arguments.src_strategy, "model.model_config.seq_length": arguments.seq_len,
        "processor.tokenizer.vocab_file": arguments.tokenizer})


if __name__ == "__main__":
    cli.run_command(main)
