"""The training file as batches."""
from mindrlhf.data import mindrecord
from mindrlhf.records import COLUMNS


def open_dataset(path, sidecar, *, batch_size, shuffle, shards=1, shard=0):
    """Batches of a training file, none of its rows lost.

    Rows without pairs fill up the last global batch, so that each worker gets as many batches: the loss is a
    mean over pairs, and they have none.

    Args:
        path: the .mindrecord.
        sidecar: what read_sidecar(path) gave.
        batch_size: rows of a batch on each worker.
        shuffle: whether the order changes from epoch to epoch.
        shards: number of data-parallel workers.
        shard: which of them this is.

    Returns:
        a MindSpore dataset with the columns of records.COLUMNS.
    """
    import mindspore.dataset as ds
    sizes = {"seq_len": sidecar["seq_len"], "width": sidecar["pairs_per_row"]}
    empty = mindrecord.make_row([], [], [], pad_id=0, **sizes)
    padding = -sidecar["rows"] % (batch_size * shards)
    extra = {"padded_sample": empty, "num_padded": padding} if padding else {}
    rows = ds.MindDataset(str(path), columns_list=list(COLUMNS), num_parallel_workers=1,
                          shuffle=shuffle, num_shards=shards, shard_id=shard, **extra)
    return rows.batch(batch_size, drop_remainder=True).project(list(COLUMNS))
