"""A training file as batches."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from mindrlhf.data import mindrecord
from mindrlhf.records import COLUMNS


def open_dataset(path: str | Path, sidecar: dict[str, Any], *, batch_size: int, shuffle: bool,
                 shards: int = 1, shard: int = 0) -> Any:
    """Open a training file as batches that cover every row.

    Rows without pairs pad the last global batch, so that every worker gets the same number of
    batches. The loss is a mean over pairs, so these rows do not change it.

    Args:
        path: the .mindrecord.
        sidecar: the result of mindrecord.read_data_sidecar(path).
        batch_size: rows of a batch on each worker.
        shuffle: whether the order changes from epoch to epoch.
        shards: number of data-parallel workers.
        shard: index of this worker.

    Returns:
        A MindSpore dataset with the columns of records.COLUMNS.
    """
    import mindspore.dataset as ds
    empty = mindrecord.make_row([], pad_id=0, **mindrecord.column_sizes(sidecar))
    padding = -sidecar["rows"] % (batch_size * shards)
    extra = {"padded_sample": empty, "num_padded": padding} if padding else {}
    rows = ds.MindDataset(str(path), columns_list=list(COLUMNS), num_parallel_workers=1,
                          shuffle=shuffle, num_shards=shards, shard_id=shard, **extra)
    return rows.batch(batch_size, drop_remainder=True).project(list(COLUMNS))
