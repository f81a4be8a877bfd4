"""Rules of MindSpore 2.4 that 2.7 has dropped.

They are enforced on a CPU, so that code that breaks them on an NPU fails here too.
"""
from __future__ import annotations

import functools
from typing import Any

from mindspore import Parameter, Tensor, nn


def _set_data(self: Parameter, data: Any, slice_shape: bool = False) -> Parameter:
    """Parameter.set_data with the rule of MindSpore 2.4 (common/parameter.py).

    A parameter that a parallel plan has not sliced yet takes no values, only a tensor that is not
    initialized either.
    """
    initialized = isinstance(data, Tensor) and not data.has_init
    if initialized and self.has_init:
        raise TypeError(f"{self.name}: MindSpore 2.4 takes no values before the parameter is "
                        "initialized; set a Tensor with an init_data method")
    return SET_DATA(self, data, slice_shape)


def _recompute(self: nn.Cell, *arguments: Any, **options: Any) -> None:
    """Cell._recompute with the rule of MindSpore 2.4 (nn/cell.py).

    It may be called once per cell, including the call that an enclosing cell makes.
    """
    if self._has_config_recompute:
        raise RuntimeError(f"{type(self).__name__}: MindSpore 2.4 lets recomputation be set once "
                           "only; set it for the cell or for an enclosing cell")
    RECOMPUTE(self, *arguments, **options)


SET_DATA, RECOMPUTE = Parameter.set_data, nn.Cell._recompute


def install() -> None:
    """Enforce these rules in this process."""
    Parameter.set_data = functools.wraps(SET_DATA)(_set_data)
    nn.Cell._recompute = functools.wraps(RECOMPUTE)(_recompute)
