"""GLM-4's weights: open whole files, shards and adapters, and load them into a network."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindrlhf.checkpoints import layouts
from mindrlhf.checkpoints.containers import open_tensors
from mindrlhf.checkpoints.runs import find_step
from mindrlhf.checkpoints.shards import join_shards, require_alike
from mindrlhf.checkpoints.strict import load_strictly
from mindrlhf.checkpoints.tensors import StoredTensor
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import weight_names
from mindrlhf.models.glm4.lora import METADATA
from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.models.glm4.weight_names import is_adapter, is_cache, is_weight


@dataclass(frozen=True)
class OpenedCheckpoint:
    """The weights in a checkpoint; their values stay in the files.

    Attributes:
        place: the file, or the folder of rank_0, rank_1, ...
        files: what was opened, rank 0 first; one for a whole file.
        ranks: for each file name -> tensor.
        strategy: the strategy file that the ranks are sharded by, or None.
        step: training steps behind the weights, or None if nothing says it.
    """
    place: Path
    files: list[Path]
    ranks: list[dict[str, StoredTensor]]
    strategy: Path | None
    step: int | None

    def whole_tensors(self) -> dict[str, StoredTensor]:
        """Name -> whole tensor: shards are joined; ranks without a strategy must have equal shapes.

        Raises:
            UserError: shards and strategy do not belong together, or shards have no strategy.
        """
        if self.strategy:
            expected = is_adapter if any(map(is_adapter, self.ranks[0])) else is_weight  # LoRA saves adapters only
            return dict(join_shards(self.ranks, self.strategy, self.place, is_expected=expected))
        for tensors in self.ranks[1:]:
            require_alike(self.ranks[0], tensors)
        return self.ranks[0]


def open_checkpoint(path: str | Path, strategy: str | None = None, *, step: int | None = None,
                    report_skipped: Callable[[str], None] | None = None) -> OpenedCheckpoint:
    """Open a whole file, or the shards of several cards.

    Args:
        path: a file, or a folder of rank_0, rank_1, ...
        strategy: folder or file of strategies of the run that saved the shards; None: the ranks are equal.
        step: training steps behind the shards; None: the newest step that is intact on all ranks.
        report_skipped: called with a line about each newer step that is not; None: such a step is an error.

    Raises:
        UserError: a file is missing or damaged, or options for shards go with one file.
    """
    path = Path(path)
    if not path.is_dir():
        if strategy or step:
            raise UserError(f"{path}: is one file; --src_strategy and --step belong to a folder of rank_0, rank_1, ...")
        return OpenedCheckpoint(path, [path], [open_tensors(path)], None, None)
    found = find_step(path, step, report_skipped=report_skipped)
    ranks = [read_weights(file) for file in found.files]
    return OpenedCheckpoint(path, found.files, ranks, layouts.find_strategy(strategy), found.number)


def read_weights(path: str | Path) -> dict[str, StoredTensor]:
    """The weights in a file, without the rest of a training state: name -> tensor.

    Raises:
        UserError: the file is damaged or holds no weights.
    """
    tensors = {name: tensor for name, tensor in open_tensors(path).items() if is_weight(name)}
    if not tensors:
        raise UserError(f"{path}: holds no weights of a GLM-4")
    return tensors


def open_weights(path: str | Path, strategy: str | None = None) -> dict[str, StoredTensor]:
    """The whole weights in a file or a folder of shards: name -> tensor. Arguments as in open_checkpoint.

    Raises:
        UserError: shards and strategy do not belong together, or the newest step is damaged.
    """
    opened = open_checkpoint(path, strategy)
    tensors = opened.whole_tensors()
    if opened.place.is_dir() and not opened.strategy:
        require_whole_model({name: tensor.shape for name, tensor in tensors.items()}, opened.files[0])
    return tensors


def open_adapters(path: str | Path, strategy: str | None = None) -> dict[str, StoredTensor]:
    """The LoRA adapters of a run: name -> whole tensor, lora.REMARKS included.

    Args:
        path: an adapter file, or a folder of rank_0, rank_1, ...: output/checkpoint_network of a run.
        strategy: of the shards, as open_checkpoint takes it.
    """
    opened = open_checkpoint(path, strategy)
    remarks = {name: tensor for name, tensor in open_tensors(opened.files[0]).items() if name in METADATA}
    return {**opened.whole_tensors(), **remarks}


def require_whole_model(found: Mapping[str, tuple], place: str | Path, numbers: ModelConfig | None = None) -> None:
    """Raise UserError unless the shapes are those of a whole GLM-4: shards without their strategy are not.

    Args:
        found: name -> shape.
        place: the file, for the message.
        numbers: sizes of the model; None: as the tensors imply.
    """
    if any(map(is_adapter, found)):
        return  # adapters are checked against their base
    measured = weight_names.measure_shapes(found)
    if measured and numbers is None:
        qkv = found["transformer.encoder.layers.0.self_attention.query_key_value.weight"][0]
        heads = measured["num_attention_heads * kv_channels"]
        numbers = ModelConfig(measured["num_layers"], measured["padded_vocab_size"], measured["hidden_size"],
                          measured["ffn_hidden_size"], heads, (qkv - heads) // 2, 1, 1e-5, 1, (), 0)
    expected = weight_names.parameter_shapes(numbers) if numbers else {}
    wrong = [name for name in {**expected, **found} if expected.get(name) != tuple(found.get(name, ()))]
    if wrong:
        name = wrong[0]
        raise UserError(f"{place}: is no whole GLM-4: {name} is {list(found.get(name, ()))}, not "
                        f"{list(expected.get(name, ()))}. Shards need --src_strategy, the output/strategy of their own run")


def load_weights(network: object, path: str | Path, *, strategy: str | None = None,
                 names: Callable[[str], bool] | None = None, training_state: bool = False) -> dict[str, StoredTensor]:
    """Load every parameter of a network from a checkpoint, and every tensor of the checkpoint into the network.

    Args:
        network: a Cell. Its key-value caches are no part of a checkpoint.
        path: a .ckpt or .safetensors file with whole weights, or a folder of shards.
        strategy: of the shards, as open_checkpoint takes it.
        names: which parameters the checkpoint is responsible for; None: all.
        training_state: the checkpoint may hold the optimizer's and the Trainer's tensors as well.

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


def set_values(network: object, values: Mapping[str, Callable[[], np.ndarray]]) -> None:
    """Give parameters of a network new values.

    Args:
        network: a Cell.
        values: parameter name -> function that returns float32 values of its shape.
    """
    from mindspore import Tensor
    parameters = {parameter.name: parameter for parameter in network.get_parameters()}
    for name, make in values.items():
        parameters[name].set_data(Tensor(make(), parameters[name].dtype))
