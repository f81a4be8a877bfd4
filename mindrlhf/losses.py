"""Log-probabilities of answers and the losses of direct preference optimization.

DPO: Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290. With the policy pi, the frozen reference pi_ref,
a prompt x, a chosen answer y_w and a rejected one y_l, its equation 7 is

    loss = -log sigmoid(beta log(pi(y_w|x) / pi_ref(y_w|x)) - beta log(pi(y_l|x) / pi_ref(y_l|x)))

The implicit rewards are beta log(pi / pi_ref) of each answer; their difference is the margin. Everything is float32,
in nats.
"""
import mindspore as ms
from mindspore import nn, ops

LOSS_TYPES = ("sigmoid", "robust", "hinge", "ipo")


def dpo_loss(chosen_logratio, rejected_logratio, *, beta, loss_type="sigmoid", label_smoothing=0.0):
    """Loss of each pair.

    Args:
        chosen_logratio: Tensor, any shape, log pi(y_w|x) - log pi_ref(y_w|x). For ipo these are means over the
            answer's tokens, as in TRL; for the others sums.
        rejected_logratio: Tensor of the same shape, the same of y_l.
        beta: strength of the pull towards the reference.
        loss_type: one of LOSS_TYPES.
        label_smoothing: probability that a preference is the wrong way round; sigmoid and robust only.

    Returns:
        Tensor of the same shape, the loss of each pair.
    """
    logits = chosen_logratio - rejected_logratio
    if loss_type == "sigmoid":  # with label_smoothing: cDPO, section 3 of https://ericmitchell.ai/cdpo.pdf
        return (1 - label_smoothing) * ops.softplus(-beta * logits) + label_smoothing * ops.softplus(beta * logits)
    if loss_type == "robust":  # arXiv:2403.00409, equation 12
        flipped = label_smoothing * ops.softplus(beta * logits)
        return ((1 - label_smoothing) * ops.softplus(-beta * logits) - flipped) / (1 - 2 * label_smoothing)
    if loss_type == "hinge":  # SLiC-HF, arXiv:2305.10425, with the reference in the margin
        return ops.relu(1 - beta * logits)
    return ops.square(logits - 1 / (2 * beta))  # ipo: arXiv:2310.12036, equation 17


class TokenLogps(nn.Cell):
    """log softmax of the output layer's logits, taken at the labels.

    The vocabulary may be spread over all cards: each holds its part of the logits, and only a maximum and two sums
    per position cross between them.
    """

    def __init__(self, output_layer, vocab_size, vocab_shards):
        super().__init__(auto_prefix=False)
        spread = vocab_shards if vocab_size % vocab_shards == 0 else 1
        wide, narrow = (1, spread), (1, 1)
        self.output_layer = output_layer
        self.vocab_size = vocab_size
        self.max = ops.ReduceMax(keep_dims=True).shard((wide,))
        self.sub = ops.Sub().shard((wide, narrow))
        self.exp = ops.Exp().shard((wide,))
        self.sum = ops.ReduceSum(keep_dims=False).shard((wide,))
        self.onehot = ops.OneHot().shard((wide, (), ()))
        self.mul = ops.Mul().shard((wide, wide))
        self.on, self.off = ms.Tensor(1.0, ms.float32), ms.Tensor(0.0, ms.float32)

    def construct(self, hidden, labels):
        """hidden (N, H), labels int32 (N,) -> log-probs float32 (N,)."""
        logits = self.output_layer(hidden).astype(ms.float32)
        shifted = self.sub(logits, ops.stop_gradient(self.max(logits, 1)))
        log_normalizer = ops.log(self.sum(self.exp(shifted), 1))
        picked = self.sum(self.mul(shifted, self.onehot(labels, self.vocab_size, self.on, self.off)), 1)
        return picked - log_normalizer


class SequenceLogps(nn.Cell):
    """Log-probability of each answer: the sum over its tokens. Preprocessing and training both call this.

    Logits exist for chunk_size positions at a time, and are computed again in the backward pass.
    """

    def __init__(self, output_layer, vocab_size, *, vocab_shards=1, chunk_size=0):
        super().__init__(auto_prefix=False)
        self.token_logps = TokenLogps(output_layer, vocab_size, vocab_shards)
        self.chunk_size = chunk_size
        if chunk_size:
            self.token_logps.recompute()

    def construct(self, hidden, labels, loss_mask, segment_ids, pairs):
        """
        Args:
            hidden: (B, S, H), what the output layer takes.
            labels, loss_mask, segment_ids: int32 (B, S), see features.row_columns.
            pairs: int, P, the most segments of a row.

        Returns:
            (log-probs float32 (B, P), numbers of scored tokens float32 (B, P)); 0 for segments that are not there.
        """
        batch, length, width = hidden.shape
        flat, labels = hidden.reshape((-1, width)), labels.reshape((-1,))
        step = self.chunk_size if self.chunk_size else batch * length
        logps = ()
        for begin in range(0, batch * length, step):
            end = min(begin + step, batch * length)
            logps += (self.token_logps(flat[begin:end], labels[begin:end]),)
        mask = loss_mask.astype(ms.float32)
        scored = ops.concat(logps).reshape((batch, length)) * mask
        numbers = ops.arange(1, pairs + 1).astype(ms.int32).reshape((1, 1, -1))
        member = ops.equal(segment_ids.expand_dims(2), numbers).astype(ms.float32)  # (B, S, P)
        return (scored.expand_dims(2) * member).sum(1), (mask.expand_dims(2) * member).sum(1)
