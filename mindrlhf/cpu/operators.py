"""Stand-ins for the Ascend operators in MindFormers' GLM-4, so that its NPU network runs on a CPU.

MindFormers builds its cells as on an NPU. After install() the operators' names refer to the classes
here and in attention.py, which consist of operators that a CPU has. Each class takes the operator's
arguments, follows its documented contract, rejects what the operator rejects, and can be sharded.

| operator            | used in                          | contract (MindSpore 2.4.10)          |
|---------------------|----------------------------------|--------------------------------------|
| FlashAttentionScore | training, preprocessing, prefill | DOC/flash_attention_score_doc.yaml   |
| UnsortedSegmentSum  | gradient of the log-probs        | DOC/unsorted_segment_sum_doc.yaml    |
| RmsNorm             | every layer                      | DOC/rms_norm_doc.yaml                |
| ApplyRotaryPosEmb   | prediction with a KV cache       | FUNC/apply_rotary_pos_emb.cc; TEST   |
| ReshapeAndCache     | prediction with a KV cache       | DOC/reshape_and_cache_doc.yaml; TEST |
| PagedAttention      | prediction with a KV cache       | DOC/paged_attention_doc.yaml; TEST   |
| ArgMaxExt           | greedy and sampled tokens        | DOC/argmax_ext_doc.yaml              |
| TopkExt             | greedy and sampled tokens        | DOC/topk_ext_doc.yaml                |
| CumsumExt           | greedy and sampled tokens        | DOC/cumsum_ext_doc.yaml              |
| SortExt             | sampled tokens                   | ops/function/array_func.py, sort_ext |

DOC is op_def/yaml/doc, FUNC is infer/ops_func_impl, and TEST is the operator's file in
tests/st/ops/ascend/test_internal_ops, all of MindSpore's source. The NPU's overflow registers have
no stand-in: the training step does not read them (see training/train_step.py).

A CPU has no bfloat16 kernels, so float32 takes the place of bfloat16 here. On an NPU, the attention
and cache operators reject float32, and so does mindrlhf.config.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from mindspore import Tensor, nn, ops

from mindrlhf.cpu.attention import (
    ApplyRotaryPosEmb,
    FlashAttentionScore,
    PagedAttention,
    ReshapeAndCache,
    float_like,
)

UNSORTED_SEGMENT_SUM = ops.UnsortedSegmentSum


class UnsortedSegmentSum(nn.Cell):
    """Sum of the rows of each segment; NaN if an id is negative.

    The CPU's own kernel ignores negative ids. On Ascend they are an execution error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sum = UNSORTED_SEGMENT_SUM()

    def construct(self, x: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
        """x (N, ...), segment_ids int32 (N,) -> (num_segments, ...)."""
        sums = self.sum(x, segment_ids, num_segments)
        return sums + ops.where((segment_ids < 0).any(), float("nan"), 0.0)


class RmsNorm(nn.Cell):
    """x / sqrt(mean(x^2) + epsilon) * gamma over the last axis.

    Args:
        epsilon: above 0, at most 1.

    Raises:
        ValueError: epsilon is out of range.
    """

    def __init__(self, epsilon: float = 1e-6):
        super().__init__()
        if not 0 < epsilon <= 1:
            raise ValueError(f"RmsNorm: epsilon is {epsilon}; give a number above 0, at most 1")
        self.epsilon = epsilon
        self.square, self.mean = ops.Square(), ops.ReduceMean(keep_dims=True)
        self.add, self.rsqrt = ops.Add(), ops.Rsqrt()
        self.normalize, self.weigh = ops.Mul(), ops.Mul()

    def shard(self, strategies: tuple) -> RmsNorm:
        """Split all axes of x but the last one; strategies are those of x and gamma."""
        x, gamma = strategies
        for operator in (self.square, self.mean, self.rsqrt):
            operator.shard((x,))
        self.add.shard((x, ()))
        self.normalize.shard((x, x))
        self.weigh.shard((x, gamma))
        return self

    def construct(self, x: Tensor, gamma: Tensor) -> tuple:
        """x (..., H), gamma (H,), of one dtype -> (normalized x, 1 / root mean square (..., 1))."""
        if not float_like(x) or x.dtype != gamma.dtype:
            raise TypeError("RmsNorm: x and gamma must be of one type, float16, bfloat16 or "
                            "float32")
        factor = self.rsqrt(self.add(self.mean(self.square(x), -1), self.epsilon))
        return self.weigh(self.normalize(x, factor), gamma), factor


def argmax(x: Tensor, dim: int = -1) -> Tensor:
    """Index of the largest value along an axis; ArgMaxExt has no CPU kernel."""
    return ops.argmax(x, dim)


def topk(x: Tensor, k: int, dim: int = -1) -> tuple:
    """The k largest values along the last axis; TopkExt has no CPU kernel.

    Args:
        x: any shape.
        k: how many values.
        dim: the last axis.

    Returns:
        (values, their indices).

    Raises:
        ValueError: another axis.
    """
    if dim not in (-1, x.ndim - 1):
        raise ValueError(f"topk has a stand-in for the last axis, not {dim}")
    return ops.topk(x, k)


def sort(x: Tensor, *, dim: int = -1, descending: bool = False, stable: bool = False) -> tuple:
    """Sort the values along the last axis; SortExt has no CPU kernel.

    Args:
        x: any shape.
        dim: the last axis.
        descending: largest values first.
        stable: not used.

    Returns:
        (sorted values, their indices).

    Raises:
        ValueError: another axis.
    """
    if dim not in (-1, x.ndim - 1):
        raise ValueError(f"sort has a stand-in for the last axis, not {dim}")
    return ops.sort(x, dim, descending)


def cumsum(x: Tensor, dim: int) -> Tensor:
    """Cumulative sum along an axis; CumsumExt has no CPU kernel."""
    return ops.cumsum(x, dim)


# full name under which MindFormers imports an operator -> the stand-in
REPLACED: dict[str, Callable[..., Any]] = {
    "mindformers.modules.flash_attention.FlashAttentionScore": FlashAttentionScore,
    "mindspore.ops.UnsortedSegmentSum": UnsortedSegmentSum,
    "mindspore.ops.operations.RmsNorm": RmsNorm,
    "mindspore.ops.ApplyRotaryPosEmb": ApplyRotaryPosEmb,
    "mindspore.ops.auto_generate.ReshapeAndCache": ReshapeAndCache,
    "mindspore.ops.auto_generate.PagedAttention": PagedAttention,
    "mindspore.mint.argmax": argmax,
    "mindspore.mint.topk": topk,
    "mindspore.mint.sort": sort,
    "mindspore.mint.cumsum": cumsum}


def install() -> None:
    """Replace the operators by their stand-ins in this process, for networks built from now on."""
    for path, stand_in in REPLACED.items():
        module, name = path.rsplit(".", 1)
        setattr(importlib.import_module(module), name, stand_in)
