"""What a YAML costs, before NPUs are rented: python -m mindrlhf.plan CONFIG. Needs no MindSpore."""
from __future__ import annotations

import sys
from collections.abc import Sequence

from mindrlhf import cli, config
from mindrlhf.parallel import Plan
from mindrlhf.plan import hours, memory
from mindrlhf.plan.advice import room
from mindrlhf.plan.report import report
from mindrlhf.plan.search import nothing_fits, search_plans
from mindrlhf.plan.workload import PAIR_TOKENS, workload_of

EXAMPLE = ("  python -m mindrlhf.plan finetune_glm4_9b.yaml --devices 8 --memory 64 "
           "--data dpo.mindrecord\n"
           "  python -m mindrlhf.plan finetune_glm4_9b.yaml --search --data dpo.mindrecord "
           "--write fast.yaml")


def parser() -> cli.Parser:
    """The command line."""
    arguments = cli.Parser(
        "Estimate the memory of a card, the traffic of a step, the disk space and the hours of a "
        "run for a finetune, process or score YAML, and say what to change first if it does not "
        "fit. Exit status 1 if the plan does not fit.", EXAMPLE)
    arguments.add_argument("config", metavar="CONFIG",
                           help="YAML of a preprocessing, a training or a score")
    arguments.add_argument("--devices", type=cli.positive,
                           help="number of cards (default: that of parallel_config, or 8)")
    arguments.add_argument("--memory", type=cli.positive, default=64,
                           help="memory of a card in GB, 1e9 bytes (default: 64)")
    arguments.add_argument("--tflops", type=cli.positive, default=round(hours.PEAK / 1e12),
                           help="bfloat16 peak of a card in 1e12 operations a second (default: "
                                "%(default)s; a larger 910B has 376)")
    source = arguments.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="FILE",
                        help=".mindrecord of the preprocessing, to estimate the hours")
    source.add_argument("--src", nargs="+", metavar="PATH",
                        help="preference pairs, as the preprocessing takes them; with --tokenizer")
    source.add_argument("--pairs", type=cli.positive,
                        help="pairs of the data, if there is no file yet")
    source.add_argument("--rows", type=cli.positive,
                        help="rows of the data, if there is no file yet")
    arguments.add_argument("--tokenizer", metavar="FILE",
                           help="with --src: tokenizer.model of the model")
    arguments.add_argument("--pair_tokens", type=cli.positive,
                           help="with --pairs: mean tokens that a pair adds to a row, shared ones "
                                f"once (default: {PAIR_TOKENS})")
    arguments.add_argument("--search", action="store_true",
                           help="try plans, row lengths, batches and recomputation, and print the "
                                "ten fastest that fit")
    arguments.add_argument("--write", metavar="FILE",
                           help="with --search: write the fastest plan as a YAML on top of CONFIG")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report of a YAML, or the result of a search."""
    arguments = parser().parse_args(argv)
    if arguments.write and not arguments.search:
        raise cli.UserError("--write: writes the result of a search; add --search")
    settings = config.load_settings(arguments.config, run_mode=("finetune", "preprocess", "score"))
    plan = Plan.of(settings)
    devices = arguments.devices or (plan.cards if plan.is_sharded else 8)
    work = workload_of(settings, data=arguments.data, src=arguments.src,
                       tokenizer=arguments.tokenizer, pairs=arguments.pairs, rows=arguments.rows,
                       pair_tokens=arguments.pair_tokens)
    limit, peak = room(settings, arguments.memory), arguments.tflops * 1e12
    if arguments.search:
        lines = search_plans(arguments.config, settings, devices, limit, workload=work, peak=peak,
                             target=arguments.write)
        cli.say(*lines or [nothing_fits(settings, devices, limit)])
        fits = bool(lines)
    else:
        config.require_workers(settings, devices)
        rows = work.rows if work else None
        cli.say(*report(settings, devices, limit=limit, rows=rows, peak_rate=peak))
        fits = memory.peak_memory_of(settings, devices).bytes <= limit
    if not fits:
        sys.exit(1)


if __name__ == "__main__":
    cli.run_command(main)
