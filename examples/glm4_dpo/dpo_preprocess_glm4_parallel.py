"""Turn preference pairs into training data: tokens, masks and reference log-probs, packed into rows of a MindRecord.

Each worker tokenizes its share of the pairs and scores it with the weights as they are before training. The
result does not depend on the number of workers. Start the same command again to continue a stopped run.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mindrlhf import cli
from mindrlhf.data import features, preference, preprocess

EXAMPLE = """  bash ../../scripts/msrun_launcher.sh "dpo_preprocess_glm4_parallel.py --src pairs.jsonl \\
    --dst dpo.mindrecord --config process_glm4_9b.yaml --tokenizer tokenizer.model \\
    --load_checkpoint glm4_9b.ckpt --auto_trans_ckpt True --seq_len 8192 --dataset_type cvalues" 8"""


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--src", required=True, nargs="+", metavar="PATH",
                       help="preference pairs: .jsonl or .json files, also .gz, or folders of them")
    parse.add_argument("--dst", required=True, help="training data to write, .mindrecord; its folder is created")
    parse.add_argument("--config", required=True, help="YAML with run_mode preprocess")
    parse.add_argument("--tokenizer", help="tokenizer.model of the model")
    parse.add_argument("--load_checkpoint", help="the weights to train: what convert_weight.py wrote")
    parse.add_argument("--auto_trans_ckpt", type=cli.boolean, metavar="True|False",
                       help="load the checkpoint, a whole file or shards of any plan, into the shards of this plan")
    parse.add_argument("--src_strategy", help="if load_checkpoint is a folder of shards (rank_0, rank_1, ...): "
                                              "output/strategy of the run that saved them")
    parse.add_argument("--seq_len", type=cli.positive, help="positions (tokens) of a row")
    parse.add_argument("--dataset_type", default="auto", choices=preference.DATASET_TYPES,
                       help="fields of a row (default: auto, from the first row). cvalues: prompt, pos_resp, neg_resp; "
                            "dpo: conversations, chosen, rejected, with from and value; pairs: chosen, rejected, with or "
                            "without prompt, strings or messages with role and content")
    parse.add_argument("--truncation", default="keep_end", choices=features.TRUNCATIONS,
                       help="if prompt + answer exceed a row: cut the oldest tokens of the prompt (keep_end, the "
                            "default) or the newest (keep_start), or drop the pair. Answers are never cut")
    parse.add_argument("--on_bad_row", default="error", choices=("error", "skip"),
                       help="a row that is not a pair stops the run (default) or is left out and listed")
    parse.add_argument("--identical", default="keep", choices=("keep", "drop"),
                       help="pairs of two equal answers (default: keep; they are reported)")
    parse.add_argument("--duplicates", default="keep", choices=("keep", "drop"),
                       help="pairs that occur again (default: keep; they are reported)")
    parse.add_argument("--eval_ratio", type=cli.share, default=0.0, metavar="SHARE",
                       help="share of the pairs, from 0 to below 1, to write to DST with _eval before its suffix; no "
                            "prompt is in both files (default: 0)")
    parse.add_argument("--pack", type=cli.boolean, default=True, metavar="True|False",
                       help="put as many pairs into a row as fit (default: True), or one")
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    """Preprocess, and print a summary."""
    arguments = parser().parse_args(argv)
    options = preprocess.Options(**{name: getattr(arguments, name) for name in preprocess.OPTION_NAMES})
    preprocess.preprocess(options, arguments.config, {
        "load_checkpoint": arguments.load_checkpoint, "auto_trans_ckpt": arguments.auto_trans_ckpt,
        "src_strategy": arguments.src_strategy, "model.model_config.seq_length": arguments.seq_len,
        "processor.tokenizer.vocab_file": arguments.tokenizer})


if __name__ == "__main__":
    cli.run_command(main)
