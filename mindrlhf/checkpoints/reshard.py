"""Checkpoints from one sharding to another by MindSpore's own transformation, and the proof that it is right.

MindSpore holds all cards' files in memory at once. So it is given a few tensors at a time: memory is that
of the largest tensor, three times, and not that of the model.
"""
from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mindrlhf.checkpoints import fingerprints, layouts, shards
from mindrlhf.checkpoints.containers import TensorWriter, open_tensors, write_tensors
from mindrlhf.checkpoints.tensors import StoredTensor, count_bytes, is_finite
from mindrlhf.cli import UserError

GROUP = 1 << 28  # bytes of tensors that MindSpore is given at once


def plan_cards(source: Mapping[str, StoredTensor], strategy: Path | None, *,
            is_expected: Callable[[str], bool]) -> list[list[tuple]]:
    """What each card is to hold: list, one a card, of (name, dtype, shape) in order.

    Args:
        source: name -> whole tensor.
        strategy: the strategy file to shard them by; None: one file of whole tensors.
        is_expected: whether a name of the strategy should be in the source.

    Raises:
        UserError: the strategy is of another model.
    """
    if strategy is None:
        return [[(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in source.values()]]
    plan = layouts.read_strategy(strategy)
    lacking = [name for name in source if name not in plan]
    lost = [name for name in plan if is_expected(name) and name not in source]
    odd = [name for name, tensor in source.items()
           if name in plan and not _divides(plan[name].splits, tensor.shape)]
    if lacking or lost or odd:
        raise UserError(f"{strategy}: does not fit the checkpoint, see {(lacking + lost + odd)[0]}; give "
                        "the strategy of a run of the same model")
    def held(tensor):
        return tuple(size // parts for size, parts in zip(tensor.shape, plan[tensor.name].splits))

    shapes = [(name, tensor.dtype, held(tensor)) for name, tensor in source.items()]
    return [shapes] * plan[next(iter(source))].cards


def _divides(splits, shape):
    return len(splits) == len(shape) and not any(size % parts for size, parts in zip(shape, splits))


def reshard_tensors(ranks, strategies, wanted, files, folder, progress):
    """Write the file of each card.

    Args:
        ranks: for each card of the source a dict, name -> StoredTensor; one dict where the source is whole.
        strategies: (of the source, of the target), paths or None where whole.
        wanted: as targets() gives it.
        files: path of the file of each card of the target.
        folder: for MindSpore's intermediate files.
        progress: called with the number of bytes after each piece.
    """
    work = Path(folder) / "group"
    with ExitStack() as stack:
        writers = []
        for path, shapes in zip(files, wanted):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "wb"))
            writers.append(stack.enter_context(TensorWriter(file, path.suffix, shapes, hashed=False)))
        for names in _groups(ranks):
            work.mkdir()
            plans = [path and layouts.write_partial_strategy(path, names, work / f"{side}_strategy.ckpt")
                     for side, path in zip(("src", "dst"), strategies)]
            for rank, made in enumerate(_made(ranks, names, plans, work, len(files))):
                for name in names:
                    writers[rank].add(_bits(made[name], ranks[0][name].dtype), progress)
            shutil.rmtree(work)


def _made(ranks, names, plans, work, cards):
    """What MindSpore makes of a group of tensors for each card: dicts, name -> StoredTensor."""
    import mindspore as ms
    plans = [path and str(path) for path in plans]
    needed = [sorted(ms.rank_list_for_transform(rank, *plans)) for rank in range(cards)]
    for rank in sorted(set().union(*needed)):
        write_tensors(work / f"rank_{rank}.ckpt", [_as_bits(ranks[rank][name]) for name in names], hashed=False)
    for rank in range(cards):
        parts = {part: str(work / f"rank_{part}.ckpt") for part in needed[rank]}
        try:
            ms.transform_checkpoint_by_rank(rank, parts, str(work / "out.ckpt"), *plans)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            said = str(error).strip().split("\n")[0]
            raise UserError(f"MindSpore cannot transform {names[0]} and what follows it ({said}); check the "
                            "strategies and the disk") from None
        gc.collect()  # MindSpore leaves the tensors in cycles, which double the peak
        yield open_tensors(work / "out.ckpt")


def _groups(ranks):
    """Names of tensors that are handled together."""
    group, size = [], 0
    for name, tensor in ranks[0].items():
        if group and size + tensor.nbytes * len(ranks) > GROUP:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.nbytes * len(ranks)
    yield group


def _as_bits(tensor):
    """An item for write(). On a CPU MindSpore has no bfloat16, so its bits pass as float16."""
    dtype = "F16" if tensor.dtype == "BF16" else tensor.dtype
    return tensor.name, dtype, tensor.shape, tensor.chunks if dtype == tensor.dtype else \
        (lambda: (values.view(np.float16) for values in tensor.chunks()))


def _bits(tensor, dtype):
    """The pieces of a tensor that passed as bits."""
    return (values.view(np.uint16) for values in tensor.chunks()) if dtype == "BF16" else tensor.chunks()


def verify_files(identity: str, files: Sequence[Path], strategy: Path | None, *,
           is_expected: Callable[[str], bool]) -> None:
    """Compare what was written, read back, with the source.

    The blocks are put together by Layout's arithmetic, which knows nothing of how MindSpore moved them;
    all cards' blocks are looked at. Equal fingerprints mean equal names, dtypes, shapes and values.

    Args:
        identity: fingerprint of the source, 64 hex digits.
        files: paths of what was written, one a card.
        strategy: the strategy file by which they are sharded, or None.
        is_expected: as targets() takes it.

    Raises:
        UserError: a difference, or values that are not finite.
    """
    ranks, bad = [open_tensors(path) for path in files], set()
    written = (shards.join_shards(ranks, strategy, files[0].parents[1], is_expected=is_expected)
               if strategy else ranks[0])

    def inspect(tensor, values):
        if tensor.dtype in ("F32", "F16", "BF16", "F64") and not is_finite(values, tensor.dtype).all():
            bad.add(tensor.name)

    found = fingerprints.fingerprint(written, inspect=inspect)
    if strategy:
        shards.require_equal_replicas(written)
    if identity != found:
        raise UserError("what was read back is not what was to be written; check the disk, then try again")
    if bad:
        raise UserError(f"{sorted(bad)[0]} and {len(bad) - 1} more hold NaN or infinite values: the "
                        "training diverged; take an earlier --step")


def scratch_bytes(source, ranks):
    """Bytes of MindSpore's intermediate files at most: those of a group, and what is made of them."""
    return 2 * max(GROUP, *(tensor.nbytes * len(ranks) for tensor in ranks[0].values()),
                   *(tensor.nbytes for tensor in source.values()))


def size_on_disk(wanted):
    """Bytes that the files of all cards take."""
    return sum(count_bytes(dtype, shape) for shapes in wanted for _, dtype, shape in shapes)
