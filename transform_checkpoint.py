"""Merge trained checkpoints into one file, or reshard them for another plan, and verify the result.

Shards of a parallel run and their strategy become one file, one file becomes shards
(--dst_strategy), and shards become those of another plan (both strategies). The ranks of a
data-parallel run are equal and need no strategy.
"""
from __future__ import annotations

from collections.abc import Sequence

from mindrlhf import cli, locks
from mindrlhf.checkpoints.containers import SUFFIXES
from mindrlhf.models.glm4 import transform

EXAMPLE = """  python transform_checkpoint.py --src_checkpoint=output/checkpoint_network \\
    --src_strategy=output/strategy --dst_checkpoint=merged
  python transform_checkpoint.py --src_checkpoint=glm4_9b.ckpt \\
    --dst_strategy=output/strategy --dst_checkpoint=shards"""


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--src_checkpoint", required=True,
                       help="folder with rank_0, rank_1, ...: output/checkpoint_network, or "
                            "output/checkpoint, whose training states hold the weights too; or one "
                            "file of unsharded weights")
    parse.add_argument("--src_strategy",
                       help="folder with the run's strategy files, output/strategy; empty or "
                            "missing after data-parallel training")
    parse.add_argument("--dst_strategy",
                       help="output/strategy of a run with the plan to shard the weights for "
                            "(default: write one file)")
    parse.add_argument("--base_checkpoint",
                       help="after LoRA training: the base weights to merge the adapters into "
                            "(default: write only the adapters to one file)")
    parse.add_argument("--dst_checkpoint", required=True,
                       help="folder for merged.ckpt, or a file name that ends in .ckpt or "
                            ".safetensors; with --dst_strategy a new folder for rank_0, rank_1, "
                            "...")
    parse.add_argument("--step", type=cli.positive,
                       help="training step, if there are checkpoints of several (default: the "
                            "newest one that is intact on all ranks)")
    parse.add_argument("--format", choices=[suffix[1:] for suffix in SUFFIXES],
                       help="format of files that --dst_checkpoint does not name (default: ckpt)")
    parse.add_argument("--overwrite", action="store_true",
                       help="replace a checkpoint file that holds other weights; not with "
                            "--dst_strategy")
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    """Merge or reshard, and print what was done."""
    arguments = parser().parse_args(argv)
    source = transform.open_source(arguments.src_checkpoint, arguments.src_strategy, arguments.step)
    suffix = arguments.format and f".{arguments.format}"
    output = arguments.dst_checkpoint
    with locks.hold(output if arguments.dst_strategy else transform.file_to_write(output, suffix)):
        target = transform.plan_target(
            source, output, suffix=suffix, strategy=arguments.dst_strategy,
            base=arguments.base_checkpoint, overwrite=arguments.overwrite)
        cli.say(*transform.write_target(source, target))


if __name__ == "__main__":
    cli.run_command(main)
