"""Strict loading: every parameter comes from the checkpoint, and every tensor of the checkpoint has a parameter.

MindSpore's own loader holds a whole file in memory and loads, in silence, what fits by name. Here nothing is
loaded unless all names and all shapes agree.
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


def describe_difference(expected: Mapping[str, Shape], found: Mapping[str, Shape], *, limit: int = 3) -> str:
    """How the shapes in a file differ from those of a model, in words; empty if they agree.

    Args:
        expected: parameter name -> shape, of the model.
        found: tensor name -> shape, of the file.
        limit: names listed of each kind of difference.
    """
    def listed(names: Sequence[str]) -> str:
        return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    reshaped = [f"{name} ({list(found[name])} in the file, {list(expected[name])} in the model)"
                for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    parts = [("missing", missing), ("not in the model", unknown), ("of another shape", reshaped)]
    return "; ".join(f"{title}: {listed(names)}" for title, names in parts if names)


def load_strictly(parameters: Mapping[str, Parameter], stored: Mapping[str, StoredTensor], place: str | Path) -> None:
    """Give every parameter the values of its tensor.

    A parameter that a parallel plan shards reads its part when the network is compiled, so the files must
    stay in place until then.

    Args:
        parameters: name -> parameter; their shapes decide.
        stored: name -> tensor.
        place: the checkpoint, for messages.

    Raises:
        UserError: names or shapes differ. Nothing was loaded.
    """
    from mindrlhf.checkpoints.slices import FileTensor
    problem = describe_difference({name: parameter.shape for name, parameter in parameters.items()},
                                  {name: tensor.shape for name, tensor in stored.items()})
    if problem:
        raise UserError(f"{place}: does not fit the model of this YAML. {problem}")
    for name, parameter in parameters.items():
        parameter.set_data(FileTensor(stored[name], parameter.dtype))
