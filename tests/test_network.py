"""Cells and optimizer that replace MindFormers' on the CPU.

test_gradients.py compares their results with PyTorch's.
"""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from mindrlhf import runtime
from mindrlhf.cpu import cells, patches
from mindrlhf.models.glm4 import build


def test_adamw_is_the_formula():
    """Three steps of AdamW (arXiv:1711.05101, algorithm 2) in float64, with and without decay."""
    from mindformers.core.optim import AdamW

    patches._fuse_adamw()
    random = np.random.default_rng(0)
    start, gradients = (
        random.normal(size=(2, 40)),
        random.normal(size=(3, 2, 40)) * [[[1e-4]], [[1.0]], [[10.0]]],
    )
    parameters = [
        ms.Parameter(ms.Tensor(row, ms.float32), name=f"p{k}") for k, row in enumerate(start)
    ]
    groups = [
        {"params": parameters[:1], "weight_decay": 0.1},
        {"params": parameters[1:], "weight_decay": 0.0},
    ]
    rates = [0.0, 0.01, 0.02]  # warm-up begins at 0
    optimizer = AdamW(groups, learning_rate=rates, betas=(0.9, 0.99), eps=1e-3)

    expected, mean, square = start.copy(), np.zeros((2, 40)), np.zeros((2, 40))
    for step, (rate, gradient) in enumerate(zip(rates, gradients, strict=True), 1):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        expected *= 1 - rate * np.array([[0.1], [0.0]])
        expected -= rate * mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.99**step)) + 1e-3)
        optimizer(tuple(ms.Tensor(row, ms.float32) for row in gradient))
        np.testing.assert_allclose(
            [p.asnumpy() for p in parameters], expected, rtol=1e-5, atol=1e-7
        )


def test_queries_see_what_the_mask_leaves_them():
    """One head of one channel without rotation, all scores 0: the context is the mean of the values
    that are not masked.
    """
    values = np.array([3.0, 5.0, 10.0])
    qkv = ms.Tensor(np.stack([np.zeros(3), np.zeros(3), values], 1)[None], ms.float32)
    bias = ms.Tensor(np.triu(np.full((3, 3), -10000.0), 1)[None, None], ms.float32)
    rotation = cells.Rotation(np.ones((3, 0)), np.ones((3, 0)), heads=1, groups=1, width=1)
    own, swapped, swap = rotation(ms.Tensor([[0, 1, 2]], ms.int32))
    context = cells.Attention(1, 1)(qkv, bias, own, swapped, swap)
    np.testing.assert_allclose(context.asnumpy().ravel(), [3, 4, 6], rtol=1e-6)


def test_rotation_turns_pairs_and_leaves_the_rest():
    """At position 1, (1, 2) is rotated by 90 degrees to (-2, 1); the channels after the first R do
    not change. Position 0 rotates nothing. Queries are halved: width 4.
    """
    rotation = cells.Rotation(
        np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]]), heads=1, groups=1, width=4
    )
    positions = ms.Tensor([[1, 0], [0, 0]], ms.int32)
    own, swapped, swap = (table.asnumpy() for table in rotation(positions))
    head = np.array([1.0, 2, 3, 4])
    turned = head * own + (head @ swap) * swapped
    np.testing.assert_allclose(turned[0, :, 0], [[-1, 0.5, 1.5, 2], [-2, 1, 3, 4]])
    for row, place in ((0, 1), (1, 0), (1, 1)):
        np.testing.assert_allclose(turned[row, :, place], [head / 2, head])


@pytest.mark.parametrize(
    ("cpu", "sharded", "change", "expected"),
    [
        (True, False, {}, 1),
        (False, False, {}, 0),
        (True, True, {}, 0),
        (True, False, {"compute_dtype": "float16"}, 0),
        (True, False, {"use_past": True}, 0),
        (True, False, {"use_flash_attention": True}, 0),
    ],
)
def test_cells_are_replaced_only_where_they_fit(monkeypatch, cpu, sharded, change, expected):
    config = {
        "compute_dtype": "float32",
        "rotary_dtype": "float32",
        "use_past": False,
        "use_flash_attention": False,
        **change,
    }
    replaced = []
    monkeypatch.setattr(patches, "replace_cells", replaced.append)
    monkeypatch.setattr(runtime, "is_cpu", lambda: cpu)
    monkeypatch.setattr(runtime, "is_sharded", lambda: sharded)
    if build.can_optimize(SimpleNamespace(**config)):
        patches.optimize_cpu(nn.Cell(), SimpleNamespace(**config))
    assert len(replaced) == expected
