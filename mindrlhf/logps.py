"""Log-probabilities of answers from hidden states.

There are three implementations: for the logits of all positions at once, in chunks, and for a
vocabulary that is sharded over cards. Preprocessing, training, evaluation and scoring all call
SequenceLogps. Log-probabilities are float32, in nats.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindrlhf import runtime
from mindrlhf.arithmetic import ceil_div
from mindrlhf.parallel import MOST_CHUNKS

NONE: tuple[Tensor, ...] = ()  # tensors, before a loop collects them


class SequenceLogps(nn.Cell):
    """Log-probability of each answer: the sum over its tokens.

    Args:
        output_layer: MindFormers' Linear, hidden (N, H) -> logits (N, V).
        vocab_size: V.
        vocab_shards: number of cards that the vocabulary is sharded over.
        chunk_size: positions whose logits exist at a time; 0: all positions.
        trained: whether the output layer's weight is trained. If not, its gradient is not computed.
    """

    def __init__(self, output_layer: nn.Cell, vocab_size: int, *, vocab_shards: int = 1,
                 chunk_size: int = 0, trained: bool = True):
        super().__init__(auto_prefix=False)
        if vocab_shards > 1 or runtime.is_sharded():
            self.token_logps = ShardedVocabularyLogps(
                output_layer, vocab_size, vocab_shards=vocab_shards, chunk_size=chunk_size,
                trained=trained)
        else:
            self.token_logps = FullVocabularyLogps(output_layer, vocab_size, chunk_size=chunk_size,
                                                   trained=trained)

    def construct(self, hidden: Tensor, labels: Tensor, answer_ids: Tensor,
                  answers: int) -> Tensor:
        """
        Args:
            hidden: (B, S, H), the input of the output layer.
            labels, answer_ids: int32 (B, S), see features.row_inputs.
            answers: A, the largest number of answers in a row.

        Returns:
            log-probs, float32 (B, A), 0 for answers that a row does not have.
        """
        batch, length, width = hidden.shape
        logps = self.token_logps(hidden.reshape((-1, width)), labels.reshape((-1,)))
        numbers = ops.arange(1, answers + 1).astype(ms.int32).reshape((1, 1, -1))
        member = ops.equal(answer_ids.expand_dims(2), numbers).astype(ms.float32)  # (B, S, A)
        return (logps.reshape((batch, length, 1)) * member).sum(1)


class FullVocabularyLogps(nn.Cell):
    """log softmax of the logits, taken at the labels, where each card holds the full vocabulary.

    With chunk_size > 0, logits are computed for one block of the vocabulary at a time, about
    chunk_size * V values, and recomputed in the backward pass. Blocks of positions would take the
    same memory, but each would add its own gradient of the full weight. The gradients of blocks of
    the vocabulary are disjoint rows of the weight.

    Args:
        output_layer, vocab_size, chunk_size, trained: as in SequenceLogps.
    """

    def __init__(self, output_layer: nn.Cell, vocab_size: int, *, chunk_size: int, trained: bool):
        super().__init__(auto_prefix=False)
        self.output_layer, self.vocab_size, self.chunk_size = output_layer, vocab_size, chunk_size
        self.blocks = _VocabularyBlocks(trained)
        self.log_softmax, self.gather = ops.LogSoftmax(), ops.GatherD()

    def construct(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden (N, H), labels int32 (N,) -> log-probs float32 (N,)."""
        if not self.chunk_size:
            logps = self.log_softmax(self.output_layer(hidden).astype(ms.float32))
            return self.gather(logps, 1, labels.reshape((-1, 1))).reshape((-1,))
        weight = self.output_layer.weight.astype(hidden.dtype)
        count = min(ceil_div(hidden.shape[0], self.chunk_size), self.vocab_size)
        return self.blocks(hidden, weight, labels, ceil_div(self.vocab_size, count))[0]


class _VocabularyBlocks(nn.Cell):
    """FullVocabularyLogps in blocks, with its gradient. ops.depend runs the blocks in sequence.

    Let p be the softmax within a block, q the block's share of the total probability, and g the
    gradient of a log-prob. The gradient of a logit is then g (onehot - q p). Both g and q belong to
    a row, so they are applied to (N, H) tensors instead of (N, V) tensors.
    """

    def __init__(self, trained: bool):
        super().__init__(auto_prefix=False)
        self.trained = trained
        self.log_softmax, self.softmax = ops.LogSoftmax(), ops.Softmax()
        self.matmul, self.left = ops.MatMul(), ops.MatMul(transpose_a=True)
        self.right = ops.MatMul(transpose_b=True)
        self.segment_sum = ops.UnsortedSegmentSum()

    def construct(self, hidden: Tensor, weight: Tensor, labels: Tensor, size: int) -> tuple:
        """
        Args:
            hidden: (N, H).
            weight: (V, H), of hidden's dtype.
            labels: int32 (N,).
            size: rows of the weight in a block.

        Returns:
            (log-probs (N,), logs of the blocks' shares (N, blocks)), both float32.
        """
        normalizers = NONE
        for begin in range(0, weight.shape[0], size):
            logits = self.right(hidden, weight[begin:begin + size]).astype(ms.float32)
            normalizers += (logits[:, :1] - self.log_softmax(logits)[:, :1],)
            hidden = ops.depend(hidden, normalizers[-1])
            weight = ops.depend(weight, normalizers[-1])
        normalizers = ops.concat(normalizers, 1)
        # not logsumexp: the CPU's kernel of log rounds by the number of earlier launches
        shares = self.log_softmax(normalizers)
        normalizer = normalizers[:, :1] - shares[:, :1]
        label_rows = ops.gather(weight, labels, 0).astype(ms.float32)
        # rounded as MatMul rounds the logits of the normalizer: a certain token has log-prob 0
        picked = (hidden.astype(ms.float32) * label_rows).sum(1).astype(hidden.dtype)
        logps = picked.astype(ms.float32) - normalizer.reshape((-1,))
        return (logps - ops.abs(logps)) / 2, shares  # rounding gives no probability above 1

    def bprop(self, hidden: Tensor, weight: Tensor, labels: Tensor, size: int, out: tuple,
              dout: tuple) -> tuple:
        """Gradients of hidden and weight. That of a weight that is not trained is zero."""
        width, dtype = hidden.shape[1], hidden.dtype
        factors = dout[0].reshape((-1, 1))
        hidden, weight = ops.depend(hidden, factors), ops.depend(weight, factors)
        mine = hidden * ops.tile(factors, (1, width))
        by_hidden = ops.gather(weight, labels, 0) * ops.tile(factors, (1, width))
        factors = factors * ops.exp(out[1])
        by_weight = NONE
        for begin in range(0, weight.shape[0], size):
            block = weight[begin:begin + size]
            share = ops.tile(factors[:, begin // size:begin // size + 1], (1, width))
            softmax = self.softmax(self.right(hidden, block).astype(ms.float32)).astype(dtype)
            by_hidden -= self.matmul(softmax, block) * share
            done = by_hidden
            if self.trained:
                inside = ops.logical_and(labels >= begin, labels < begin + block.shape[0])
                # labels of other blocks go to an extra last segment
                place = ops.where(inside, labels - begin, block.shape[0])
                own = self.segment_sum(mine, place, block.shape[0] + 1)[:block.shape[0]]
                others = self.left(softmax, (hidden * share).astype(dtype))
                by_weight += ((own - others).astype(dtype),)
                done = ops.depend(by_weight[-1], by_hidden)
            hidden, weight = ops.depend(hidden, done), ops.depend(weight, done)
            mine = ops.depend(mine, done)
        by_weight = ops.concat(by_weight) if self.trained else ops.zeros_like(weight)
        return by_hidden.astype(dtype), by_weight, ops.zeros_like(labels), 0


class ShardedVocabularyLogps(nn.Cell):
    """log softmax of the logits, taken at the labels, where cards share the vocabulary.

    Each card computes the logits of its part of the vocabulary. The cards exchange a maximum and
    two sums per position. The backward pass handles the chunks one at a time, the last one first,
    and accumulates one gradient of the weight and one of the hidden states.

    Args:
        output_layer: hidden (N, H) -> logits (N, V). It has a `weight` (V, H), a `matmul` and,
            unless it computes in float32, the compute `dtype`, which is hidden's.
        vocab_size: V.
        vocab_shards: number of cards that the vocabulary is sharded over.
        chunk_size: positions in a chunk, at least: chunks grow where there would be more than
            MOST_CHUNKS. The backward pass recomputes a chunk's logits. 0: one chunk, whose logits
            are kept.
        trained: whether the weight is trained.
    """

    def __init__(self, output_layer: nn.Cell, vocab_size: int, *, vocab_shards: int,
                 chunk_size: int, trained: bool):
        super().__init__(auto_prefix=False)
        self.output_layer, self.chunk_size, self.trained = output_layer, chunk_size, trained
        self.chunk = _ShardedVocabularyChunk(output_layer.matmul, vocab_size, vocab_shards)
        # A cell per use: MindSpore's parallel passes loop forever on a chain of calls of one cell.
        count = MOST_CHUNKS if chunk_size else 0
        compute_dtype = getattr(output_layer, "dtype", ms.float32)
        self.hidden_after = nn.CellList([_ControlDependency() for _ in range(count)])
        self.weight_after = nn.CellList([_ControlDependency() for _ in range(count)])
        self.weight_cast = nn.CellList([_WeightCast(compute_dtype) for _ in range(count)])
        if chunk_size:
            self.chunk.recompute()

    def construct(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden (N, H), labels int32 (N,) -> log-probs float32 (N,)."""
        length, weight = hidden.shape[0], self.output_layer.weight
        step = max(self.chunk_size, ceil_div(length, MOST_CHUNKS)) if self.chunk_size else length
        matrix, logps = weight.astype(hidden.dtype), NONE
        for begin in range(0, length, step):
            if begin:
                hidden = self.hidden_after[begin // step](logps[-1], hidden)
                if self.trained:
                    weight = self.weight_after[begin // step](logps[-1], weight)
                    matrix = (weight if weight.dtype == hidden.dtype
                              else self.weight_cast[begin // step](weight))
            end = min(begin + step, length)
            logps += (self.chunk(hidden[begin:end], matrix, labels[begin:end]),)
        return ops.concat(logps)


class _ControlDependency(nn.Cell):
    """Return a tensor unchanged, but only after a chunk's log-probs have been computed.

    The backward pass runs in reverse: the gradient of the log-probs waits for that of the tensor.
    Without this, chunks would overlap and their gradients would be added up only at the end.

    The cell has one output because MindSpore loses the layout of a second one in a parallel plan.
    """

    def construct(self, logps: Tensor, tensor: Tensor) -> Tensor:
        """logps (N,), tensor of any shape -> tensor."""
        return ops.depend(tensor, logps)

    def bprop(self, logps: Tensor, tensor: Tensor,  # noqa: ARG002  MindSpore's signature
              out: Tensor, dout: Tensor) -> tuple:  # noqa: ARG002
        """Gradients of both inputs."""
        return ops.depend(ops.zeros_like(logps), dout), dout


class _WeightCast(nn.Cell):
    """The weight in the compute dtype; its gradients are accumulated in float32.

    A plain cast of _ControlDependency's output stops MindSpore's parallel passes with "The
    pointer[prim] is null".
    """

    def __init__(self, dtype: Any):
        super().__init__(auto_prefix=False)
        self.dtype = dtype

    def construct(self, weight: Tensor) -> Tensor:
        """weight (V, H) -> the same shape in the compute dtype."""
        return weight.astype(self.dtype)

    def bprop(self, weight: Tensor, out: Tensor, dout: Tensor) -> tuple:  # noqa: ARG002  MindSpore's
        """Gradient of the weight, in its own dtype."""
        return (dout.astype(weight.dtype),)


class _ShardedVocabularyChunk(nn.Cell):
    """ShardedVocabularyLogps of one chunk.

    Args:
        matmul: the output layer's, (N, H), (V, H) -> (N, V).
        vocab_size: V.
        vocab_shards: number of cards that the vocabulary is sharded over.
    """

    def __init__(self, matmul: Callable[[Tensor, Tensor], Tensor], vocab_size: int,
                 vocab_shards: int):
        super().__init__(auto_prefix=False)
        spread = vocab_shards if vocab_size % vocab_shards == 0 else 1
        wide, narrow = (1, spread), (1, 1)
        self.product = matmul
        self.vocab_size = vocab_size
        self.max = ops.ReduceMax(keep_dims=True).shard((wide,))
        self.sub = ops.Sub().shard((wide, narrow))
        self.exp = ops.Exp().shard((wide,))
        self.sum = ops.ReduceSum(keep_dims=False).shard((wide,))
        self.onehot = ops.OneHot().shard((wide, (), ()))
        self.mul = ops.Mul().shard((wide, wide))
        self.on, self.off = ms.Tensor(1.0, ms.float32), ms.Tensor(0.0, ms.float32)

    def construct(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """hidden (N, H), weight (V, H), labels int32 (N,) -> log-probs float32 (N,)."""
        logits = self.product(hidden, weight).astype(ms.float32)
        shifted = self.sub(logits, ops.stop_gradient(self.max(logits, 1)))
        log_normalizer = ops.log(self.sum(self.exp(shifted), 1))
        onehot = self.onehot(labels, self.vocab_size, self.on, self.off)
        picked = self.sum(self.mul(shifted, onehot), 1)
        return picked - log_normalizer
