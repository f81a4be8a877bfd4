"""Reshard a checkpoint for another parallel plan by MindSpore's own transformation, and verify it.

MindSpore holds the files of all cards in memory at once. Therefore it gets a few tensors at a time:
peak memory is three times the largest tensor and does not depend on the size of the model.
"""
from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Optional

import numpy as np

from mindrlhf.checkpoints import fingerprints, layouts, shards
from mindrlhf.checkpoints.containers import TensorWriter, open_tensors, write_tensors
from mindrlhf.checkpoints.tensors import StoredTensor, TensorItem, TensorSpec, is_finite
from mindrlhf.cli import UserError

GROUP = 1 << 28  # bytes of tensors that MindSpore gets at once

Ranks = Sequence[Mapping[str, StoredTensor]]  # for each card name -> tensor, rank 0 first
Strategies = tuple[Optional[Path], Optional[Path]]  # files of source and target; None if unsharded


def plan_cards(source: Mapping[str, StoredTensor], strategy: Path | None, *,
               is_expected: Callable[[str], bool]) -> list[list[TensorSpec]]:
    """Plan which tensors each card holds, in order.

    Args:
        source: name -> unsharded tensor.
        strategy: the strategy file to shard by; None: one file of unsharded tensors.
        is_expected: whether a name in the strategy must be in the source.

    Returns:
        one list for each card.

    Raises:
        UserError: the strategy is of another model.
    """
    if strategy is None:
        return [[tensor.spec for tensor in source.values()]]
    plan = layouts.read_strategy(strategy)
    lacking = [name for name in source if name not in plan]
    lost = [name for name in plan if is_expected(name) and name not in source]
    odd = [name for name, tensor in source.items()
           if name in plan and not _divides(plan[name].splits, tensor.shape)]
    if lacking or lost or odd:
        first = (lacking + lost + odd)[0]
        raise UserError(f"{strategy}: does not fit the checkpoint, see {first}; give the strategy "
                        "of a run of the same model")

    def held(tensor: StoredTensor) -> tuple[int, ...]:
        splits = plan[tensor.name].splits
        return tuple(size // parts for size, parts in zip(tensor.shape, splits))

    specs = [TensorSpec(name, tensor.dtype, held(tensor)) for name, tensor in source.items()]
    return [specs] * plan[next(iter(source))].cards


def _divides(splits: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a tensor of a shape can be split into equal parts."""
    return len(splits) == len(shape) and not any(size % parts for size, parts in zip(shape, splits))


def reshard_tensors(ranks: Ranks, strategies: Strategies, wanted: Sequence[Sequence[TensorSpec]],
                    files: Sequence[Path], folder: Path, progress: Callable[[int], object]) -> None:
    """Write the file of each card.

    Args:
        ranks: the tensors of each card of the source; one mapping if the source is unsharded.
        strategies: the strategy files of the source and of the target.
        wanted: the tensors of each card of the target, as plan_cards() returns them.
        files: the file of each card of the target.
        folder: for MindSpore's intermediate files.
        progress: called after each piece with its size in bytes.
    """
    work = folder / "group"
    with ExitStack() as stack:
        writers = []
        for path, specs in zip(files, wanted):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "wb"))
            writer = TensorWriter(file, path.suffix, specs, hashed=False)
            writers.append(stack.enter_context(writer))
        for names in _groups(ranks):
            work.mkdir()
            copies = (work / "src_strategy.ckpt", work / "dst_strategy.ckpt")
            plans = [path and layouts.write_partial_strategy(path, names, copy)
                     for path, copy in zip(strategies, copies)]
            for rank, made in enumerate(_transform_group(ranks, names, plans, work, len(files))):
                for name in names:
                    writers[rank].add(_from_bits(made[name], ranks[0][name].dtype), progress)
            shutil.rmtree(work)


def _transform_group(ranks: Ranks, names: Sequence[str], strategies: Sequence[Path | None],
                     work: Path, cards: int) -> Iterator[dict[str, StoredTensor]]:
    """Yield for each card what MindSpore makes of a group of tensors: name -> tensor."""
    import mindspore as ms
    plans = [path and str(path) for path in strategies]
    with _as_one_line(names):
        needed = [sorted(ms.rank_list_for_transform(rank, *plans)) for rank in range(cards)]
        if not set().union(*needed) <= set(range(len(ranks))):
            raise ValueError("the strategies name cards that the source does not have")
    for rank in sorted(set().union(*needed)):
        items = [_as_bits(ranks[rank][name]) for name in names]
        write_tensors(work / f"rank_{rank}.ckpt", items, hashed=False)
    for rank in range(cards):
        parts = {part: str(work / f"rank_{part}.ckpt") for part in needed[rank]}
        with _as_one_line(names):
            ms.transform_checkpoint_by_rank(rank, parts, str(work / "out.ckpt"), *plans)
        gc.collect()  # MindSpore leaves the tensors in reference cycles, which double the peak
        yield open_tensors(work / "out.ckpt")


@contextmanager
def _as_one_line(names: Sequence[str]) -> Iterator[None]:
    """Turn an error of MindSpore about a group of tensors into a UserError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"MindSpore cannot transform {names[0]} and the tensors after it "
                        f"({first_line}); check the strategies and the disk") from None


def _groups(ranks: Ranks) -> Iterator[list[str]]:
    """Names of the tensors that are transformed together."""
    group: list[str] = []
    size = 0
    for name, tensor in ranks[0].items():
        if group and size + tensor.nbytes * len(ranks) > GROUP:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.nbytes * len(ranks)
    yield group


def _as_bits(tensor: StoredTensor) -> TensorItem:
    """Present bfloat16 as float16 of the same bits, because MindSpore has no bfloat16 on a CPU."""
    if tensor.dtype != "BF16":
        return TensorItem(*tensor.spec, tensor.chunks)
    return TensorItem(tensor.name, "F16", tensor.shape,
                      lambda: (values.view(np.float16) for values in tensor.chunks()))


def _from_bits(tensor: StoredTensor, dtype: str) -> Iterator[np.ndarray]:
    """The pieces of a tensor that went through _as_bits."""
    if dtype != "BF16":
        return tensor.chunks()
    return (values.view(np.uint16) for values in tensor.chunks())


def verify_files(identity: str, files: Sequence[Path], strategy: Path | None, *,
                 is_expected: Callable[[str], bool]) -> None:
    """Read back what was written and compare it with the source.

    TensorLayout joins the blocks of all cards, independently of MindSpore's transformation. Equal
    fingerprints mean equal names, dtypes, shapes and values.

    Args:
        identity: fingerprint of the source, 64 hex digits.
        files: the written file of each card.
        strategy: the strategy file that they are sharded by, or None.
        is_expected: as in plan_cards().

    Raises:
        UserError: the files differ from the source, or contain NaN or infinite values.
    """
    ranks = [open_tensors(path) for path in files]
    joined = shards.join_shards(ranks, strategy, files[0].parents[1],
                                is_expected=is_expected) if strategy else {}
    bad: set[str] = set()

    def inspect(tensor: StoredTensor, values: np.ndarray) -> None:
        is_float = tensor.dtype in ("F32", "F16", "BF16", "F64")
        if is_float and not is_finite(values, tensor.dtype).all():
            bad.add(tensor.name)

    found = fingerprints.fingerprint(joined or ranks[0], inspect=inspect)
    shards.require_equal_replicas(joined)
    if identity != found:
        raise UserError("the files read back differ from the source; check the disk and try again")
    if bad:
        raise UserError(f"{sorted(bad)[0]} and {len(bad) - 1} more hold NaN or infinite values: "
                        "training diverged; give an earlier --step")


def scratch_bytes(source: Mapping[str, StoredTensor], ranks: Ranks) -> int:
    """Upper limit in bytes of MindSpore's intermediate files: a group's input and output."""
    return 2 * max(GROUP, *(tensor.nbytes * len(ranks) for tensor in ranks[0].values()),
                   *(tensor.nbytes for tensor in source.values()))


def size_on_disk(wanted: Iterable[Iterable[TensorSpec]]) -> int:
    """Size in bytes of the files of all cards."""
    return sum(spec.nbytes for specs in wanted for spec in specs)
