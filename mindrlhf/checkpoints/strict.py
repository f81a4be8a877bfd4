"""Strict loading: a missing or extra parameter, or a wrong shape, is named and nothing is loaded.

MindSpore's own loader reads the entire file into memory and silently loads what matches by name.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindrlhf.checkpoints.tensors import StoredTensor
from mindrlhf.cli import UserError

if TYPE_CHECKING:
    from mindspore import Parameter

Shape = Sequence[int]


def describe_difference(expected: Mapping[str, Shape], found: Mapping[str, Shape], *,
                        limit: int = 3) -> str:
    """Describe how the shapes in a file differ from those of a model.

    Args:
        expected: parameter name -> shape, of the model.
        found: tensor name -> shape, of the file.
        limit: the most names listed for each kind of difference.

    Returns:
        one line; empty if names and shapes agree.
    """
    def listed(names: Sequence[str]) -> str:
        more = f" and {len(names) - limit} more" if len(names) > limit else ""
        return ", ".join(names[:limit]) + more

    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    reshaped = [f"{name} ({list(found[name])} in the file, {list(expected[name])} in the model)"
                for name in expected
                if name in found and tuple(found[name]) != tuple(expected[name])]
    parts = [("missing", missing), ("not in the model", unknown), ("of another shape", reshaped)]
    return "; ".join(f"{title}: {listed(names)}" for title, names in parts if names)


def load_strictly(parameters: Mapping[str, Parameter], stored: Mapping[str, StoredTensor],
                  place: str | Path) -> None:
    """Give every parameter the values of its tensor.

    A parameter that a parallel plan shards reads its part when the network is compiled, so the
    files must remain in place until then.

    Args:
        parameters: name -> parameter.
        stored: name -> tensor.
        place: the checkpoint, for messages.

    Raises:
        UserError: names or shapes differ; nothing was loaded.
    """
    from mindrlhf.checkpoints.slices import FileTensor
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    problem = describe_difference(shapes, {name: tensor.shape for name, tensor in stored.items()})
    if problem:
        raise UserError(f"{place}: does not fit the model of this YAML. {problem}")
    for name, parameter in parameters.items():
        parameter.set_data(FileTensor(stored[name], parameter.dtype))
