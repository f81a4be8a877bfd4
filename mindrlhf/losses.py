"""The losses of direct preference optimization, one function each.

DPO: Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290. With the policy pi, the
frozen reference pi_ref, a prompt x, a chosen answer y_w and a rejected answer y_l, each pair has
two log-ratios:

    chosen_logratio   = log pi(y_w|x) - log pi_ref(y_w|x)
    rejected_logratio = log pi(y_l|x) - log pi_ref(y_l|x)

beta times a log-ratio is an implicit reward, and the difference between a pair's two rewards is its
margin. `logits` below is chosen_logratio - rejected_logratio, so the margin is beta * logits.

Every function takes float32 logits in nats, of any shape, and returns the loss of each pair in that
shape. Log-probabilities are sums over the answer's tokens. For ipo they are means, as in TRL.
"""
from __future__ import annotations

from typing import Callable

from mindspore import Tensor, ops


def sigmoid(logits: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, equation 7: -log sigmoid(beta * logits).

    label_smoothing e > 0 gives conservative DPO, section 3 of https://ericmitchell.ai/cdpo.pdf:
    -(1 - e) log sigmoid(beta * logits) - e log sigmoid(-beta * logits). The code uses
    -log sigmoid(x) = softplus(-x).

    Args:
        logits: chosen_logratio - rejected_logratio of each pair.
        beta: strength of the KL constraint to the reference.
        label_smoothing: assumed share of flipped labels, e.
    """
    as_labeled = _softplus(-beta * logits)
    flipped = _softplus(beta * logits)
    return (1 - label_smoothing) * as_labeled + label_smoothing * flipped


def robust(logits: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO, arXiv:2403.00409, equation 12: unbiased if labels are flipped with probability e.

    Args: as in sigmoid(); label_smoothing is e.
    """
    flipped = label_smoothing * _softplus(beta * logits)
    as_labeled = (1 - label_smoothing) * _softplus(-beta * logits)
    return (as_labeled - flipped) / (1 - 2 * label_smoothing)


def hinge(logits: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:  # noqa: ARG001
    """SLiC-HF, arXiv:2305.10425, with the reference in the margin: max(0, 1 - beta * logits).

    Args: as in sigmoid(); label_smoothing is not used.
    """
    return ops.relu(1 - beta * logits)


def ipo(logits: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:  # noqa: ARG001
    """IPO, arXiv:2310.12036, equation 17: (logits - 1 / (2 beta))^2, of log-ratios per token.

    Args: as in sigmoid(); label_smoothing is not used.
    """
    return ops.square(logits - 1 / (2 * beta))


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), with the same bits in every run.

    MindSpore's CPU kernels of softplus and log split their work by the number of earlier launches,
    and round the parts differently, so a resumed run would print other last digits. The form
    (x + |x|) / 2, unlike max(x, 0), has the gradient 1/2 at 0, where training starts.
    """
    return (x + ops.abs(x)) / 2 + ops.log1p(ops.exp(-ops.abs(x)))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid, "robust": robust, "hinge": hinge, "ipo": ipo}


def get_loss(loss_type: str) -> Callable[..., Tensor]:
    """The loss function of this name; it takes (logits, beta, label_smoothing).

    Raises:
        ValueError: the name is unknown.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"unknown loss_type {loss_type!r}; known: {', '.join(LOSSES)}")
    return LOSSES[loss_type]
