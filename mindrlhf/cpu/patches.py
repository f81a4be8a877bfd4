"""Corrections and optimizations of MindFormers' network. cpu/__init__.py lists every patch."""
from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindrlhf.cpu.cells import replace_cells


def fix_cpu(network: nn.Cell) -> None:
    """Correct a ChatGLM2 network that MindFormers built, in place."""
    encoder = network.transformer.encoder
    if not hasattr(encoder, "cast"):  # nn.Cell has a cast up to MindSpore 2.6
        encoder.cast = ops.Cast()
    for layer in encoder.layers:
        if hasattr(layer.self_attention, "core_attention"):
            layer.self_attention.core_attention.mul_mask = _FloatMaskMul()


class _FloatMaskMul(nn.Cell):
    """mask * -10000 in float32.

    Without flash attention, MindFormers multiplies a uint8 mask by -10000. The product wraps to
    +240, and attention then prefers the positions that it must not see.
    """

    def construct(self, mask: Tensor, factor: float) -> Tensor:
        """Any shape -> float32 of that shape."""
        return mask.astype(ms.float32) * factor


def optimize_cpu(network: nn.Cell, config: Any) -> None:
    """Replace the optimizer's kernels and, in a float32 network, cells by faster and smaller ones.

    The results are the same.

    Args:
        network: Glm4DPO, changed in place.
        config: the model_config section.
    """
    _fuse_adamw()
    _square_by_rows()
    if config.compute_dtype == config.rotary_dtype == "float32":
        replace_cells(network)


def _fuse_adamw() -> None:
    """Make MindFormers' AdamW update a parameter with Adam's kernel.

    MindFormers uses a dozen kernels, which need six times the parameter's size. With
    b1 = 1 - beta1^t and b2 = sqrt(1 - beta2^t), AdamW's

        p (1 - lr decay) - lr (m / b1) / (sqrt(v) / b2 + eps)

    is the kernel's p - lr b2 / b1 m / (sqrt(v) + eps b2) of a parameter that has decayed.
    The kernel of AdamWeightDecay takes six times as long as that of Adam.
    """
    from mindformers.core.optim import adamw
    update, kernel = ops.MultitypeFuncGraph("fused_adamw"), ops.Adam()

    @update.register(*["Tensor"] * 10, "Bool")
    def run(beta1: Tensor, beta2: Tensor, eps: Tensor, step: Tensor, rate: Tensor, decay: Tensor,
            parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor,
            wanted: bool) -> Tensor:
        if wanted:
            first, second = ops.pow(beta1, step), ops.pow(beta2, step)
            decayed = ops.assign(parameter, parameter * (1 - rate * decay))
            gradient = ops.depend(gradient.astype(ms.float32), decayed)
            return kernel(parameter, mean, square, first, second, rate, beta1, beta2,
                          eps * ops.sqrt(1 - second), gradient)
        return gradient

    adamw._adamw_opt = update


def _square_by_rows() -> None:
    """Make MindFormers' norm of the gradients sum up each row first.

    The kernel that sums up a full matrix takes ten times as long as that for the last axis.
    """
    from mindformers.core import clip_grad
    square_sum, mean = ops.MultitypeFuncGraph("square_by_rows"), ops.ReduceMean()

    @square_sum.register("Tensor")
    def run(gradient: Tensor) -> Tensor:
        gradient = gradient.astype(ms.float32)
        rows = (gradient * gradient).reshape((-1, gradient.shape[-1]))
        return mean(mean(rows, 1), 0).reshape((1,)) * gradient.size

    clip_grad.get_square_sum = square_sum
