"""Rules of MindSpore 2.4 that 2.7 has dropped, held on a CPU, so that what breaks them on an NPU breaks here too."""
from __future__ import annotations

import functools
from typing import Any

from mindspore import Parameter, Tensor, nn


def _set_data(self: Parameter, data: Any, slice_shape: bool = False) -> Parameter:
    """Parameter.set_data as 2.4 has it (common/parameter.py): a parameter that a parallel plan has not given its part yet
    takes no values, only a tensor that is not initialized either."""
    initialized = isinstance(data, Tensor) and not data.has_init
    if initialized and self.has_init:
        raise TypeError(f"{self.name}: MindSpore 2.4 takes no values before the parameter is initialized; give a Tensor with "
                        "an init_data of its own")
    return SET_DATA(self, data, slice_shape)


def _recompute(self: nn.Cell, *arguments: Any, **options: Any) -> None:
    """Cell._recompute as 2.4 has it (nn/cell.py): once for a cell, its own call or that of a cell around it."""
    if self._has_config_recompute:
        raise RuntimeError(f"{type(self).__name__}: MindSpore 2.4 lets recomputation be set once only, for a cell or for one "
                           "around it")
    RECOMPUTE(self, *arguments, **options)


SET_DATA, RECOMPUTE = Parameter.set_data, nn.Cell._recompute


def install() -> None:
    """Hold these rules in this process."""
    Parameter.set_data = functools.wraps(SET_DATA)(_set_data)
    nn.Cell._recompute = functools.wraps(RECOMPUTE)(_recompute)
