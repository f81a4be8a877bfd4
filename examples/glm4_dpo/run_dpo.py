"""Train GLM-4 with DPO, ask the trained model, or score it: run_mode finetune, predict or score."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mindrlhf import cli, config
from mindrlhf.inference import options

EXAMPLE = """\
  bash ../../scripts/msrun_launcher.sh "run_dpo.py --config finetune_glm4_9b.yaml \\
    --train_dataset dpo.mindrecord --vocab_file tokenizer.model \\
    --load_checkpoint glm4_9b.ckpt --auto_trans_ckpt True" 8
  python run_dpo.py --config predict_glm4_9b.yaml --load_checkpoint merged.ckpt \\
    --auto_trans_ckpt False --vocab_file tokenizer.model --predict_data "How do I apologize?\""""


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--config", required=True, help="YAML: run_mode finetune, predict or score")
    parse.add_argument("--train_dataset", metavar="FILE",
                       help="finetune: training data, the .mindrecord from preprocessing")
    parse.add_argument("--eval_dataset", metavar="FILE",
                       help="finetune: .mindrecord of held-out pairs, evaluated before, during and "
                            "after training")
    parse.add_argument("--vocab_file", metavar="FILE", help="tokenizer.model of the model")
    parse.add_argument("--load_checkpoint", metavar="PATH",
                       help="finetune: the weights that preprocessing used as the reference; "
                            "predict, score: any weights")
    parse.add_argument("--auto_trans_ckpt", type=cli.boolean, metavar="True|False",
                       help="True: load_checkpoint may be a folder of shards of any plan, with "
                            "--src_strategy. One file is cut for each card with either value")
    parse.add_argument("--src_strategy", metavar="FOLDER",
                       help="if load_checkpoint or adapter_checkpoint is a folder of shards "
                            "(rank_0, rank_1, ...): output/strategy of the run that saved them")
    parse.add_argument("--adapter_checkpoint", metavar="PATH",
                       help="predict, score: LoRA adapters to add to load_checkpoint: "
                            "output/checkpoint_network of their training, or one file")
    options.add_prediction(parse)
    options.add_scoring(parse)
    parse.add_argument("--resume", metavar="auto|FILE",
                       help="finetune: resume from the newest intact state in output_dir, or from "
                            "a file of output/checkpoint/rank_0")
    parse.add_argument("--allow_changes", type=cli.boolean, metavar="True|False",
                       help="finetune: with --resume, go on with other settings, data or weights "
                            "than those of the state (default: False)")
    parse.add_argument("--overwrite", action="store_true",
                       help="finetune: remove an earlier run in output_dir first; predict: replace "
                             "answers in --output that were made otherwise; score: the same for "
                            "scores")
    parse.add_argument("--output_dir", metavar="FOLDER",
                       help="for checkpoints, strategies and metrics (default: ./output)")
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    """Train, answer or score."""
    arguments = parser().parse_args(argv)
    modes = ("finetune", "predict", "score")
    settings = config.load_settings(arguments.config, run_mode=modes, overrides={
        "load_checkpoint": arguments.load_checkpoint,
        "auto_trans_ckpt": arguments.auto_trans_ckpt,
        "src_strategy": arguments.src_strategy,
        "resume_training": arguments.resume,
        "output_dir": arguments.output_dir,
        "train_dataset.data_loader.dataset_dir": arguments.train_dataset,
        "eval_dataset.data_loader.dataset_dir": arguments.eval_dataset,
        "processor.tokenizer.vocab_file": arguments.vocab_file})
    options.require_options_of(settings["run_mode"], arguments)
    if settings["run_mode"] == "finetune":
        from mindrlhf.card import record
        from mindrlhf.training import run
        run.finetune(settings, overwrite=arguments.overwrite,
                     allow_changes=bool(arguments.allow_changes),
                     finish=partial(record.write_after_training, arguments.config, settings))
    elif settings["run_mode"] == "score":
        from mindrlhf.inference import score
        score.score(settings, arguments)
    else:
        from mindrlhf.inference import generate
        generate.predict(settings, arguments)


if __name__ == "__main__":
    cli.run_command(main)
