"""GLM-4's weights: open single files, shards and adapters, and load them into a network."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mindrlhf.checkpoints import layouts
from mindrlhf.checkpoints.containers import open_tensors
from mindrlhf.checkpoints.runs import find_step
from mindrlhf.checkpoints.shards import join_shards, require_alike
from mindrlhf.checkpoints.strict import load_strictly
from mindrlhf.checkpoints.tensors import StoredTensor
from mindrlhf.cli import UserError
from mindrlhf.config import find_checkpoint
from mindrlhf.models.glm4 import weight_names
from mindrlhf.models.glm4.lora import METADATA
from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.models.glm4.weight_names import is_adapter, is_adapter_weight, is_cache, is_weight

if TYPE_CHECKING:
    from mindspore import nn


@dataclass(frozen=True)
class OpenedCheckpoint:
    """The weights in a checkpoint; their values stay in the files.

    Attributes:
        place: the file, or the folder of rank_0, rank_1, ...
        files: the files that were opened, rank 0 first.
        ranks: for each file, name -> tensor.
        strategy: the strategy file that the ranks are sharded by, or None.
        step: training steps behind the weights, or None if unknown.
    """
    place: Path
    files: list[Path]
    ranks: list[dict[str, StoredTensor]]
    strategy: Path | None
    step: int | None

    def whole_tensors(self) -> dict[str, StoredTensor]:
        """Name -> unsharded tensor. Shards are joined; ranks without a strategy must be alike.

        Raises:
            UserError: shards and strategy do not match, or shards have no strategy.
        """
        if self.strategy:
            is_lora = any(map(is_adapter, self.ranks[0]))  # LoRA saves adapters only
            return dict(join_shards(self.ranks, self.strategy, self.place,
                                    is_expected=is_adapter_weight if is_lora else is_weight))
        for tensors in self.ranks[1:]:
            require_alike(self.ranks[0], tensors)
        return self.ranks[0]

    def adapter_metadata(self) -> dict[str, StoredTensor]:
        """Rank and alpha of LoRA adapters, named as in lora.METADATA; empty for full weights."""
        return {name: tensor for name, tensor in open_tensors(self.files[0]).items()
                if name in METADATA}


def open_checkpoint(path: str | Path, strategy: str | None = None, *, step: int | None = None,
                    report_skipped: Callable[[str], None] | None = None) -> OpenedCheckpoint:
    """Open a single file, or the shards of several cards.

    Args:
        path: a file, a folder with one, or a folder of rank_0, rank_1, ...
        strategy: folder or file of strategies of the run that saved the shards; None: all ranks
            hold the same weights.
        step: training steps behind the shards; None: the newest step that is intact on all ranks.
        report_skipped: called with a line about each newer step that is damaged; None: a damaged
            newer step is an error.

    Raises:
        UserError: a file is missing or damaged, or options for shards are given with one file.
    """
    path = Path(find_checkpoint(str(path)))
    if not path.is_dir():
        if strategy or step:
            raise UserError(f"{path}: is one file; --src_strategy and --step belong to a folder of "
                            "rank_0, rank_1, ...")
        return OpenedCheckpoint(path, [path], [open_tensors(path)], None, None)
    found = find_step(path, step, report_skipped=report_skipped)
    ranks = [read_weights(file) for file in found.files]
    return OpenedCheckpoint(path, found.files, ranks, layouts.find_strategy(strategy),
                            found.number)


def read_weights(path: str | Path) -> dict[str, StoredTensor]:
    """The weights in a file, without the other tensors of a training state: name -> tensor.

    Raises:
        UserError: the file is damaged or holds no weights.
    """
    tensors = {name: tensor for name, tensor in open_tensors(path).items() if is_weight(name)}
    if not tensors:
        raise UserError(f"{path}: holds no weights of a GLM-4")
    return tensors


def open_weights(path: str | Path, strategy: str | None = None) -> dict[str, StoredTensor]:
    """The unsharded weights in a file or a folder of shards: name -> tensor.

    Args: as in open_checkpoint().

    Raises:
        UserError: shards and strategy do not match, or the newest step is damaged.
    """
    opened = open_checkpoint(path, strategy)
    tensors = opened.whole_tensors()
    if opened.place.is_dir() and not opened.strategy:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        require_whole_model(shapes, opened.files[0])
    return tensors


def open_adapters(path: str | Path, strategy: str | None = None) -> dict[str, StoredTensor]:
    """The LoRA adapters of a run: name -> unsharded tensor, including lora.METADATA.

    Args:
        path: an adapter file, or a run's output/checkpoint_network: rank_0, rank_1, ...
        strategy: of the shards, as open_checkpoint takes it.
    """
    opened = open_checkpoint(path, strategy)
    return {**opened.whole_tensors(), **opened.adapter_metadata()}


def require_whole_model(found: Mapping[str, tuple[int, ...]], place: str | Path,
                        config: ModelConfig | None = None) -> None:
    """Check that the shapes are those of an unsharded GLM-4.

    Args:
        found: name -> shape.
        place: the file, for the message.
        config: sizes of the model; None: as the tensors imply.

    Raises:
        UserError: a tensor is missing or has another shape, as in shards without their strategy.
    """
    if any(map(is_adapter, found)):
        return  # adapters are checked against their base
    measured = weight_names.measure_shapes(found)
    if measured and config is None:
        config = ModelConfig(  # heads of size 1 give the same shapes
            num_layers=measured["num_layers"],
            padded_vocab_size=measured["padded_vocab_size"],
            hidden_size=measured["hidden_size"],
            ffn_hidden_size=measured["ffn_hidden_size"],
            num_attention_heads=measured["num_attention_heads * kv_channels"],
            multi_query_group_num=measured["multi_query_group_num * kv_channels"],
            kv_channels=1, layernorm_epsilon=1e-5, rope_ratio=1, eos_token_id=(), pad_token_id=0)
    expected = weight_names.parameter_shapes(config) if config else {}
    wrong = [name for name in {**expected, **found}
             if expected.get(name) != tuple(found.get(name, ()))]
    if wrong:
        name = wrong[0]
        raise UserError(f"{place}: is not a complete GLM-4: {name} is "
                        f"{list(found.get(name, ()))}, not {list(expected.get(name, ()))}. Shards "
                        "need --src_strategy, the output/strategy of their own run")


def load_weights(network: nn.Cell, path: str | Path, *, strategy: str | None = None,
                 names: Callable[[str], bool] | None = None,
                 training_state: bool = False) -> dict[str, StoredTensor]:
    """Load a checkpoint into a network, strictly.

    Every parameter must be in the checkpoint, except key-value caches, and every tensor of the
    checkpoint in the network.

    Args:
        network: its parameters are set.
        path: a .ckpt or .safetensors file with unsharded weights, or a folder of shards.
        strategy: of the shards, as in open_checkpoint().
        names: whether the checkpoint should hold a parameter; None: it should hold all.
        training_state: whether the checkpoint may also hold tensors of optimizer and Trainer.

    Returns:
        name -> tensor that was loaded.

    Raises:
        UserError: names or shapes differ. Nothing was loaded.
    """
    stored = open_weights(path, strategy)
    parameters = {parameter.name: parameter for parameter in network.get_parameters()
                  if not is_cache(parameter.name) and (names is None or names(parameter.name))}
    if training_state:
        stored = {name: tensor for name, tensor in stored.items() if name in parameters}
    load_strictly(parameters, stored, path)
    return stored


def set_values(network: nn.Cell, values: Mapping[str, Callable[[], np.ndarray]]) -> None:
    """Set parameters of a network; each card of a parallel plan takes its part.

    Args:
        network: its parameters are set.
        values: parameter name -> function that returns float32 values of its shape.
    """
    from mindrlhf.checkpoints.slices import ComputedTensor, FileTensor
    parameters = {parameter.name: parameter for parameter in network.get_parameters()}
    for name, make in values.items():
        parameter = parameters[name]
        parameter.set_data(FileTensor(ComputedTensor(make, parameter.shape), parameter.dtype))
