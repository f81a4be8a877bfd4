"""The data of a training run, and the share of them that a worker reads."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindrlhf import cli, config
from mindrlhf.arithmetic import ceil_div
from mindrlhf.data import mindrecord
from mindrlhf.data.dataset import open_dataset
from mindrlhf.models.glm4 import template
from mindrlhf.parallel import Plan

MOST_PADDING = 64  # rows of a step for each row of the data


@dataclass(frozen=True)
class Data:
    """Paths and sidecars of the training data and, with --eval_dataset, of the held-out data."""
    train_path: str
    train: dict[str, Any]
    eval_path: str | None
    eval: dict[str, Any] | None


@dataclass(frozen=True)
class Feed:
    """How a worker reads the data.

    Attributes:
        batch_size: rows that this worker reads for a step.
        shards: number of parts into which the rows are split over the workers.
        shard: this worker's part.
    """
    batch_size: int
    shards: int
    shard: int


def open_data(settings: dict[str, Any]) -> Data:
    """Find the data of a run and check that they fit its YAML and tokenizer.

    Raises:
        UserError: a file is missing, or the data were made with other settings.
    """
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
    path = config.get_setting(settings, "train_dataset.data_loader.dataset_dir")
    if not path:
        raise cli.UserError("no training data given; --train_dataset names the .mindrecord that "
                            "preprocessing wrote")
    model = settings["model"]["model_config"]
    tokenizer = Glm4Tokenizer(settings["processor"]["tokenizer"]["vocab_file"])
    tokenizer.check_vocabulary(model["padded_vocab_size"])
    eval_path = config.get_setting(settings, "eval_dataset.data_loader.dataset_dir") or None
    sidecars = {}
    for each in filter(None, (path, eval_path)):
        sidecars[each] = mindrecord.read_data_sidecar(each)
        mindrecord.require_unchanged(each, sidecars[each])
        mindrecord.require_made_for(each, sidecars[each], seq_len=model["seq_length"],
                                    template=template.VERSION, tokenizer=tokenizer.fingerprint,
                                    checkpoint=None)
    data = Data(path, sidecars[path], eval_path, sidecars[eval_path] if eval_path else None)
    warn_of_overlap(data)
    return data


def warn_of_overlap(data: Data) -> None:
    """Say so if both files were made of the same pairs, but not by one run, which keeps them apart.

    Args:
        data: of the run.
    """
    if not data.eval or data.eval.get("run") == data.train.get("run"):
        return
    train, held_out = ({each["sha256"] for each in made.get("source", [])}
                       for made in (data.train, data.eval))
    if train & held_out:
        cli.say(f"warning: {data.train_path} and {data.eval_path} were made of the same pairs by "
                "two runs, so pairs may be in both, and the evaluation too good. One run with "
                "--eval_ratio keeps them apart")


def feed_of(settings: dict[str, Any]) -> Feed:
    """How this worker is fed: its rows of a step, all parts of gradient accumulation included."""
    runner = settings["runner_config"]
    rows = runner["batch_size"] * runner.get("gradient_accumulation_steps", 1)
    plan = Plan.of(settings)
    if plan.is_sharded:  # every card reads the full batch; the graph takes the card's part of it
        return Feed(batch_size=rows * plan.data, shards=1, shard=0)
    return Feed(batch_size=rows, shards=cli.workers(), shard=cli.rank())


def require_filled_batches(settings: dict[str, Any], data: Data) -> None:
    """Raise UserError if a step takes far more rows than there are, so that most are padding."""
    feed, runner = feed_of(settings), settings["runner_config"]
    rows, found = feed.batch_size * feed.shards, data.train["rows"]
    if runner["batch_size"] > 1 and rows > MOST_PADDING * found:
        raise cli.UserError(
            f"runner_config.batch_size: {runner['batch_size']} makes {rows} rows a step, and "
            f"{data.train_path} has {found}; give at most {ceil_div(found, feed.shards)}")


def open_rows(path: str, made: dict[str, Any], feed: Feed, *, shuffle: bool) -> Any:
    """This worker's batches of a .mindrecord, a MindSpore dataset.

    Args:
        path: the .mindrecord.
        made: its sidecar.
        feed: how this worker reads it.
        shuffle: whether the order of the rows changes from epoch to epoch.
    """
    return open_dataset(path, made, batch_size=feed.batch_size, shuffle=shuffle, shards=feed.shards,
                        shard=feed.shard)
