"""The losses of direct preference optimization, one function each.

DPO: Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290. With the policy pi, the frozen
reference pi_ref, a prompt x, a chosen answer y_w and a rejected answer y_l, each pair has two log-ratios:

    chosen_logratio   = log pi(y_w|x) - log pi_ref(y_w|x)
    rejected_logratio = log pi(y_l|x) - log pi_ref(y_l|x)

beta times a log-ratio is an implicit reward, and the difference of a pair's two rewards is its margin.
`logits` below is chosen_logratio - rejected_logratio: the margin is beta * logits.

Every function takes Tensors of one shape, float32, in nats, and returns the loss of each pair in that shape.
Log-probabilities are sums over the answer's tokens, except for ipo, which takes means, as in TRL.
"""
from __future__ import annotations

from typing import Callable

from mindspore import Tensor, ops


def sigmoid(logits: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, equation 7: -log sigmoid(beta * logits).

    With label_smoothing e > 0 it is conservative DPO, section 3 of https://ericmitchell.ai/cdpo.pdf:
    -(1 - e) log sigmoid(beta * logits) - e log sigmoid(-beta * logits), and -log sigmoid(x) = softplus(-x).
    """
    right_way_round = ops.softplus(-beta * logits)
    wrong_way_round = ops.softplus(beta * logits)
    return (1 - label_smoothing) * right_way_round + label_smoothing * wrong_way_round


def robust(logits: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO, arXiv:2403.00409, equation 12: unbiased if labels are flipped with probability e."""
    wrong_way_round = label_smoothing * ops.softplus(beta * logits)
    right_way_round = (1 - label_smoothing) * ops.softplus(-beta * logits)
    return (right_way_round - wrong_way_round) / (1 - 2 * label_smoothing)


def hinge(logits: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:  # noqa: ARG001
    """SLiC-HF, arXiv:2305.10425, with the reference in the margin: max(0, 1 - beta * logits)."""
    return ops.relu(1 - beta * logits)


def ipo(logits: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:  # noqa: ARG001
    """IPO, arXiv:2310.12036, equation 17: (logits - 1 / (2 beta))^2, of log-ratios per token."""
    return ops.square(logits - 1 / (2 * beta))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid, "robust": robust, "hinge": hinge, "ipo": ipo}


def get_loss(loss_type: str) -> Callable[..., Tensor]:
    """The loss of this name, as a function of (logits, beta, label_smoothing).

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"unknown loss_type {loss_type!r}; known: {', '.join(LOSSES)}")
    return LOSSES[loss_type]
