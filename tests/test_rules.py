"""Rules of MindSpore 2.4 that hold on the CPU too."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from mindspore.common.initializer import initializer

from mindrlhf.checkpoints.slices import OwnPart
from mindrlhf.cpu import rules


@pytest.fixture
def held(monkeypatch):
    monkeypatch.setattr(ms.Parameter, "set_data", ms.Parameter.set_data)
    monkeypatch.setattr(nn.Cell, "_recompute", nn.Cell._recompute)
    rules.install()


@pytest.fixture
def waiting():
    """A parameter of a parallel plan that is not compiled yet."""
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel")
    yield ms.Parameter(initializer("ones", (4, 8), ms.float32), name="waiting")
    ms.reset_auto_parallel_context()


def test_a_parameter_that_waits_for_its_plan_takes_no_values(held, waiting):
    values = np.zeros((4, 8), np.float32)
    with pytest.raises(TypeError, match="waiting: MindSpore 2.4 takes no values"):
        waiting.set_data(ms.Tensor(values))
    waiting.set_data(OwnPart(values, (4, 8), ms.float32))
    assert (waiting.init_data().asnumpy() == 0).all()
    waiting.set_data(ms.Tensor(values + 1))  # it has values now


def test_recomputation_is_set_once(held):
    outer = nn.SequentialCell(nn.Dense(2, 2))
    outer[0].recompute()
    with pytest.raises(RuntimeError, match="MindSpore 2.4 lets recomputation be set once"):
        outer.recompute()
