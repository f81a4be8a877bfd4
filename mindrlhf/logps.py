"""Log-probabilities of answers from hidden states: all at once, in chunks, or with the vocabulary sharded over cards.

Preprocessing, training, evaluation and score all call SequenceLogps. Everything is float32, in nats.
"""
from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops

from mindrlhf import runtime
from mindrlhf.arithmetic import ceil_div

MOST_CHUNKS = 64  # of SpreadLogps: each is a part of the compiled graph


class SequenceLogps(nn.Cell):
    """Log-probability of each answer: the sum over its tokens. Preprocessing and training both call this.

    Args:
        output_layer: MindFormers' Linear, hidden (N, H) -> logits (N, V).
        vocab_size: V.
        vocab_shards: over how many cards the vocabulary is spread.
        chunk_size: of how many positions the logits may exist at a time; 0: of all.
        trained: whether the output layer's weight is; no gradient is computed for it otherwise.
    """

    def __init__(self, output_layer, vocab_size, *, vocab_shards=1, chunk_size=0, trained=True):
        super().__init__(auto_prefix=False)
        if vocab_shards > 1 or runtime.is_sharded():
            self.token_logps = SpreadLogps(output_layer, vocab_size, vocab_shards=vocab_shards, chunk_size=chunk_size,
                                           trained=trained)
        else:
            self.token_logps = LocalLogps(output_layer, vocab_size, chunk_size=chunk_size, trained=trained)

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
        logps = self.token_logps(hidden.reshape((-1, width)), labels.reshape((-1,)))
        mask = loss_mask.astype(ms.float32)
        scored = logps.reshape((batch, length)) * mask
        numbers = ops.arange(1, pairs + 1).astype(ms.int32).reshape((1, 1, -1))
        member = ops.equal(segment_ids.expand_dims(2), numbers).astype(ms.float32)  # (B, S, P)
        return (scored.expand_dims(2) * member).sum(1), (mask.expand_dims(2) * member).sum(1)


class LocalLogps(nn.Cell):
    """The same where each card holds the whole vocabulary.

    With a chunk_size, logits exist for a block of the vocabulary at a time, chunk_size * V numbers, and are computed
    again in the backward pass. Blocks of positions would need the same, but each would add its own gradient of the
    whole weight; those of blocks of the vocabulary lie side by side. Arguments as in SpreadLogps.
    """

    def __init__(self, output_layer, vocab_size, *, chunk_size, trained):
        super().__init__(auto_prefix=False)
        self.output_layer, self.vocab_size, self.chunk_size = output_layer, vocab_size, chunk_size
        self.blocks, self.log_softmax, self.gather = _VocabularyBlocks(trained), ops.LogSoftmax(), ops.GatherD()

    def construct(self, hidden, labels):
        """hidden (N, H), labels int32 (N,) -> log-probs float32 (N,)."""
        if not self.chunk_size:
            logps = self.log_softmax(self.output_layer(hidden).astype(ms.float32))
            return self.gather(logps, 1, labels.reshape((-1, 1))).reshape((-1,))
        weight = self.output_layer.weight.astype(hidden.dtype)
        count = min(ceil_div(hidden.shape[0], self.chunk_size), self.vocab_size)
        return self.blocks(hidden, weight, labels, ceil_div(self.vocab_size, count))[0]


class _VocabularyBlocks(nn.Cell):
    """LocalLogps in blocks, with its gradient. Block after block: ops.depend keeps them from overlapping.

    With p the softmax within a block, q the block's share of the whole, and g the gradient of a log-prob, that of a
    logit is g (onehot - q p): factors of a row, applied to (N, H) instead of (N, V).
    """

    def __init__(self, trained):
        super().__init__(auto_prefix=False)
        self.trained = trained
        self.log_softmax, self.softmax = ops.LogSoftmax(), ops.Softmax()
        self.matmul, self.left, self.right = ops.MatMul(), ops.MatMul(transpose_a=True), ops.MatMul(transpose_b=True)
        self.segment_sum = ops.UnsortedSegmentSum()

    def construct(self, hidden, weight, labels, size):
        """hidden (N, H), weight (V, H), labels int32 (N,), size of a block
        -> log-probs (N,), logs of the blocks' shares (N, blocks), float32."""
        normalizers = ()
        for begin in range(0, weight.shape[0], size):
            logits = self.right(hidden, weight[begin:begin + size]).astype(ms.float32)
            normalizers += (logits[:, :1] - self.log_softmax(logits)[:, :1],)
            hidden, weight = ops.depend(hidden, normalizers[-1]), ops.depend(weight, normalizers[-1])
        normalizers = ops.concat(normalizers, 1)
        normalizer = ops.logsumexp(normalizers, 1, True)
        picked = (hidden.astype(ms.float32) * ops.gather(weight, labels, 0).astype(ms.float32)).sum(1)
        return picked - normalizer.reshape((-1,)), normalizers - normalizer

    def bprop(self, hidden, weight, labels, size, out, dout):
        """Gradients of hidden and weight; zeros for a weight that is not trained."""
        width, dtype = hidden.shape[1], hidden.dtype
        factors = dout[0].reshape((-1, 1))
        hidden, weight = ops.depend(hidden, factors), ops.depend(weight, factors)
        mine = hidden * ops.tile(factors, (1, width))
        by_hidden = ops.gather(weight, labels, 0) * ops.tile(factors, (1, width))
        factors = factors * ops.exp(out[1])
        by_weight = ()
        for begin in range(0, weight.shape[0], size):
            block = weight[begin:begin + size]
            share = ops.tile(factors[:, begin // size:begin // size + 1], (1, width))
            softmax = self.softmax(self.right(hidden, block).astype(ms.float32)).astype(dtype)
            by_hidden -= self.matmul(softmax, block) * share
            done = by_hidden
            if self.trained:
                inside = ops.logical_and(labels >= begin, labels < begin + block.shape[0])
                place = ops.where(inside, labels - begin, block.shape[0])  # the last: labels of other blocks
                own = self.segment_sum(mine, place, block.shape[0] + 1)[:block.shape[0]]
                by_weight += ((own - self.left(softmax, (hidden * share).astype(dtype))).astype(dtype),)
                done = ops.depend(by_weight[-1], by_hidden)
            hidden, weight, mine = ops.depend(hidden, done), ops.depend(weight, done), ops.depend(mine, done)
        by_weight = ops.concat(by_weight) if self.trained else ops.zeros_like(weight)
        return by_hidden.astype(dtype), by_weight, ops.zeros_like(labels), 0


class SpreadLogps(nn.Cell):
    """log softmax of the output layer's logits, taken at the labels, where the vocabulary is spread over cards.

    Each holds its part of the logits, and only a maximum and two sums per position cross between them. The backward
    pass takes the chunks one after the other, the last one first, and adds to one gradient of the weight and one of
    the hidden states.

    Args:
        output_layer: Cell, hidden (N, H) -> logits (N, V), with its `weight` (V, H), `matmul` and, unless float32, the
            `dtype` of the computation, which is that of hidden.
        vocab_size: V.
        vocab_shards: over how many cards the vocabulary is spread.
        chunk_size: positions at a time, whose logits are computed again in the backward pass, more where these would
            be over MOST_CHUNKS chunks; 0: all, and kept.
        trained: whether the weight is.
    """

    def __init__(self, output_layer, vocab_size, *, vocab_shards, chunk_size, trained):
        super().__init__(auto_prefix=False)
        self.output_layer, self.chunk_size, self.trained = output_layer, chunk_size, trained
        self.chunk = _SpreadChunk(output_layer.matmul, vocab_size, vocab_shards)
        # a cell for each use: MindSpore's parallel passes follow a chain of calls of one cell without end
        count = MOST_CHUNKS if chunk_size else 0
        self.hidden_after = nn.CellList([_After() for _ in range(count)])
        self.weight_after = nn.CellList([_After() for _ in range(count)])
        self.typed = nn.CellList([_Typed(getattr(output_layer, "dtype", ms.float32)) for _ in range(count)])
        if chunk_size:
            self.chunk.recompute()

    def construct(self, hidden, labels):
        """hidden (N, H), labels int32 (N,) -> log-probs float32 (N,)."""
        length, weight = hidden.shape[0], self.output_layer.weight
        step = max(self.chunk_size, ceil_div(length, MOST_CHUNKS)) if self.chunk_size else length
        matrix, logps = weight.astype(hidden.dtype), ()
        for begin in range(0, length, step):
            if begin:
                hidden = self.hidden_after[begin // step](logps[-1], hidden)
                if self.trained:
                    weight = self.weight_after[begin // step](logps[-1], weight)
                    matrix = weight if weight.dtype == hidden.dtype else self.typed[begin // step](weight)
            end = min(begin + step, length)
            logps += (self.chunk(hidden[begin:end], matrix, labels[begin:end]),)
        return ops.concat(logps)


class _After(nn.Cell):
    """A tensor, once a chunk's log-probs are there; in the backward pass, which takes the chunks in reverse, the
    gradient of these once the tensor's is. Else chunks would overlap, and add up their gradients at the end only.

    There is one output because MindSpore loses the layout of more in a parallel plan.
    """

    def construct(self, logps, tensor):
        """logps (N,), tensor of any shape -> tensor."""
        return ops.depend(tensor, logps)

    def bprop(self, logps, tensor, out, dout):  # noqa: ARG002  MindSpore's signature
        """Gradients of both."""
        return ops.depend(ops.zeros_like(logps), dout), dout


class _Typed(nn.Cell):
    """The weight in the type of the computation; its gradients are float32 when they are added up. A plain cast of
    what _After returns stops MindSpore's parallel passes ("The pointer[prim] is null")."""

    def __init__(self, dtype):
        super().__init__(auto_prefix=False)
        self.dtype = dtype

    def construct(self, weight):
        """weight (V, H) -> the same in another type."""
        return weight.astype(self.dtype)

    def bprop(self, weight, out, dout):  # noqa: ARG002  MindSpore's signature
        """Its gradient."""
        return (dout.astype(weight.dtype),)


class _SpreadChunk(nn.Cell):
    """SpreadLogps of one chunk."""

    def __init__(self, product, vocab_size, vocab_shards):
        super().__init__(auto_prefix=False)
        spread = vocab_shards if vocab_size % vocab_shards == 0 else 1
        wide, narrow = (1, spread), (1, 1)
        self.product = product
        self.vocab_size = vocab_size
        self.max = ops.ReduceMax(keep_dims=True).shard((wide,))
        self.sub = ops.Sub().shard((wide, narrow))
        self.exp = ops.Exp().shard((wide,))
        self.sum = ops.ReduceSum(keep_dims=False).shard((wide,))
        self.onehot = ops.OneHot().shard((wide, (), ()))
        self.mul = ops.Mul().shard((wide, wide))
        self.on, self.off = ms.Tensor(1.0, ms.float32), ms.Tensor(0.0, ms.float32)

    def construct(self, hidden, weight, labels):
        """hidden (N, H), weight (V, H), labels int32 (N,) -> log-probs float32 (N,)."""
        logits = self.product(hidden, weight).astype(ms.float32)
        shifted = self.sub(logits, ops.stop_gradient(self.max(logits, 1)))
        log_normalizer = ops.log(self.sum(self.exp(shifted), 1))
        picked = self.sum(self.mul(shifted, self.onehot(labels, self.vocab_size, self.on, self.off)), 1)
        return picked - log_normalizer
