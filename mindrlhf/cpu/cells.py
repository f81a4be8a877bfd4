"""Cells that take the place of MindFormers' in a GLM-4 that trains on the CPU: same weights, names and results.

What they spare is all but the matrix products:

- MindSpore's CPU kernels of Add, Mul, Sub and Div keep four buffers of the size of their result for ever where
  an operand is broadcast, and take three times as long. Here operands are tiled to the same shape first.
- Gradients are written by hand, from what a layer keeps anyway: inputs and outputs of its matrix products.
  Attention probabilities, rotated queries and keys, and the parts of SwiGLU are computed again. ops.depend on the
  incoming gradient keeps the compiler from taking those of the forward pass.
- Key and value heads are not repeated: the queries of a group are one longer matrix.
- The rotation of neighbouring pairs is a product with a signed permutation, exact in floating point.
"""
import mindspore as ms
import numpy as np
from mindspore import nn, ops


class RMSNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, float32.

    Args:
        norm: MindFormers' ChatGLM2RMSNorm, whose weight it takes over.
    """

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight
        self.normalize = _Normalize(float(norm.eps))

    def construct(self, x):
        """(B, S, H) -> (B, S, H)."""
        return self.normalize(x, self.weight)


class _Normalize(nn.Cell):
    """RMSNorm as a function of x and weight, with its gradient."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps
        self.tile, self.mean = ops.Tile(), ops.ReduceMean(keep_dims=True)

    def factor(self, x):
        """1 / root mean square of each row of (N, H), tiled to (N, H)."""
        return self.tile(ops.rsqrt(self.mean(ops.square(x), 1) + self.eps), (1, x.shape[1]))

    def construct(self, x, weight):
        """(..., H), (H,) -> (..., H)."""
        rows = x.reshape((-1, x.shape[-1]))
        scale = self.tile(weight.reshape((1, -1)), (rows.shape[0], 1))
        return (rows * self.factor(rows) * scale).reshape(x.shape)

    def bprop(self, x, weight, out, dout):
        """With n = x f, f the factor: dx = f (dy w - n mean(dy w n)), dw = sum(dy n)."""
        x, weight = ops.depend(x, dout), ops.depend(weight, dout)
        rows, dout = x.reshape((-1, x.shape[-1])), dout.reshape((-1, x.shape[-1]))
        factor = self.factor(rows)
        normal = rows * factor
        by_normal = dout * self.tile(weight.reshape((1, -1)), (rows.shape[0], 1))
        along = self.tile(self.mean(by_normal * normal, 1), (1, rows.shape[1]))
        return (factor * (by_normal - normal * along)).reshape(x.shape), (dout * normal).sum(0)


class SwiGLU(nn.Cell):
    """silu(gate) * up of [gate, up]."""

    def __init__(self):
        super().__init__()
        self.split = ops.Split(axis=1, output_num=2)

    def construct(self, x):
        """(B, S, 2F) -> (B, S, F)."""
        gate, up = self.split(x.reshape((-1, x.shape[-1])))
        return (gate * ops.sigmoid(gate) * up).reshape((*x.shape[:-1], -1))

    def bprop(self, x, out, dout):
        """silu' = s (1 + gate (1 - s)), s the sigmoid of gate."""
        x = ops.depend(x, dout)
        gate, up = self.split(x.reshape((-1, x.shape[-1])))
        dout = dout.reshape(gate.shape)
        sigmoid = ops.sigmoid(gate)
        silu = gate * sigmoid
        by_gate = dout * up * (sigmoid + silu - silu * sigmoid)
        return (ops.concat((by_gate, dout * silu), 1).reshape(x.shape),)


class Attention(nn.Cell):
    """Queries, keys and values of all heads to their context: rotation, softmax, weighted sum.

    Args:
        heads, groups: numbers of query heads, and of key and value heads.
    """

    def __init__(self, heads, groups):
        super().__init__()
        self.heads, self.groups = heads, groups
        self.softmax, self.product = ops.Softmax(-1), ops.BatchMatMul()
        self.left, self.right = ops.BatchMatMul(transpose_a=True), ops.BatchMatMul(transpose_b=True)
        self.matmul, self.matmul_back = ops.MatMul(), ops.MatMul(transpose_b=True)
        self.apart_all, self.apart = ops.Split(2, heads + 2 * groups), ops.Split(2, heads)
        self.side_by_side_all, self.side_by_side = ops.Split(1, heads + 2 * groups), ops.Split(1, heads)

    def parts(self, qkv, own, swapped, swap):
        """(B, S, (heads + 2 groups) D) -> queries (B, groups, heads / groups * S, D), keys and values."""
        batch, length, _ = qkv.shape
        width, each, turning = own.shape[3], (batch, 1, 1, 1), self.heads + self.groups
        heads = self.apart_all(qkv)
        turned = ops.concat(heads[:turning], 1).reshape((batch, turning, length, width))
        neighbour = self.matmul(turned.reshape((-1, width)), swap).reshape(turned.shape)
        turned = turned * ops.tile(own, each) + neighbour * ops.tile(swapped, each)
        queries = turned[:, :self.heads].reshape((batch, self.groups, -1, width))
        values = ops.concat(heads[turning:], 1).reshape((batch, self.groups, length, width))
        return queries, turned[:, self.heads:], values

    def probabilities(self, queries, keys, bias):
        """Softmax of the scores, (B, groups, heads / groups * S, S)."""
        scores = self.right(queries, keys)
        return self.softmax(scores + ops.tile(bias, (1, self.heads, 1, 1)).reshape(scores.shape))

    def construct(self, qkv, bias, own, swapped, swap):
        """
        Args:
            qkv: (B, S, (heads + 2 groups) D).
            bias: (B, 1, S, S), added to the scores.
            own, swapped, swap: see rotation().

        Returns:
            (B, S, heads * D).
        """
        queries, keys, values = self.parts(qkv, own, swapped, swap)
        context = self.product(self.probabilities(queries, keys, bias), values)
        return ops.concat(self.side_by_side(context.reshape((qkv.shape[0], -1, own.shape[3]))), 2)

    def bprop(self, qkv, bias, own, swapped, swap, out, dout):
        """Through softmax: ds = p (dp - sum(dp p)), and sum(dp p) = sum(dout out) of a head. The rest is constant."""
        batch, length, _ = qkv.shape
        qkv, out = ops.depend(qkv, dout), ops.depend(out, dout)
        queries, keys, values = self.parts(qkv, own, swapped, swap)
        p = self.probabilities(queries, keys, bias)
        dout = ops.concat(self.apart(dout), 1).reshape(queries.shape)
        out = ops.concat(self.apart(out), 1).reshape(queries.shape)
        mean = ops.tile((dout * out).sum(3, keepdims=True), (1, 1, 1, length))
        by_scores = p * (self.right(dout, values) - mean)
        by_queries = self.product(by_scores, keys).reshape((batch, self.heads, length, -1))
        by_turned = ops.concat((by_queries, self.left(by_scores, queries)), 1)
        each = (batch, 1, 1, 1)
        neighbour = (by_turned * ops.tile(swapped, each)).reshape((-1, own.shape[3]))
        by_turned = by_turned * ops.tile(own, each) + self.matmul_back(neighbour, swap).reshape(by_turned.shape)
        by_heads = ops.concat((by_turned, self.left(p, dout)), 1)
        by_heads = by_heads.reshape((batch, -1, own.shape[3]))
        return (ops.concat(self.side_by_side_all(by_heads), 2),
                ops.zeros_like(bias), ops.zeros_like(own), ops.zeros_like(swapped), ops.zeros_like(swap))


def rotation(cosines, sines, *, heads, groups, width):
    """Tables of the rotary embedding: head * own + (head @ swap) * swapped. Queries are scaled by width^-0.5 as well.

    Args:
        cosines, sines: float arrays (S, R / 2), for the first R channels of a head, pair by pair.
        heads, groups: numbers of query heads, and of key and value heads.
        width: D, channels of a head.

    Returns:
        own, swapped: float32 arrays (1, heads + groups, S, D); swap: (D, D), (a, b) -> (-b, a) of each pair.
    """
    length, pairs = cosines.shape
    swap = np.zeros((width, width), np.float32)
    for pair in range(0, 2 * pairs, 2):
        swap[pair + 1, pair], swap[pair, pair + 1] = -1, 1
    still = width - 2 * pairs
    own = np.concatenate((np.repeat(cosines, 2, 1), np.ones((length, still))), 1)
    swapped = np.concatenate((np.repeat(sines, 2, 1), np.zeros((length, still))), 1)
    scale = np.repeat([width**-0.5, 1.0], [heads, groups]).reshape((1, -1, 1, 1))
    return (scale * own).astype(np.float32), (scale * swapped).astype(np.float32), swap


class SelfAttention(nn.Cell):
    """MindFormers' ChatGLM2SelfAttention around Attention.

    Args:
        attention: the cell that it takes the place of.
        tables: tuple of Tensors, see rotation(). All layers get the same ones.
    """

    def __init__(self, attention, tables):
        super().__init__()
        self.query_key_value, self.dense = attention.query_key_value, attention.dense
        self.heads = attention.n_head
        self.attention = Attention(attention.n_head, attention.n_kv_head)
        self.own, self.swapped, self.swap = tables

    def construct(self, hidden_states, attention_mask, rotary_pos_emb, batch_valid_length=None, prefix_key_value=None,
                  block_tables=None, slot_mapping=None):
        """hidden_states (B, S, H), attention_mask (B, 1, S, S), 1 where not to look -> (B, S, H).

        The first position always sees itself: nothing is added to the tables. But it makes them unknown to the
        compiler, which would tile them for each layer, forward and backward, and keep the results.
        """
        bias = attention_mask.astype(ms.float32) * -10000.0
        zero = bias[0, 0, 0, 0]
        own, swapped = self.own + zero, self.swapped + zero
        return self.dense(self.attention(self.query_key_value(hidden_states), bias, own, swapped, self.swap))


def replace_cells(network):
    """Put these cells in the place of MindFormers', in place.

    Args:
        network: MindFormers' ChatGLM2ForConditionalGeneration or a subclass, float32, without flash attention and cache.
    """
    names = [(parameter, parameter.name) for parameter in network.get_parameters()]
    encoder, cache = network.transformer.encoder, network.transformer.freqs_mgr.cache.asnumpy()
    config = network.config
    tables = rotation(cache[..., 0], cache[..., 1], heads=config.num_attention_heads,
                      groups=config.multi_query_group_num, width=config.kv_channels)
    tables = tuple(map(ms.Tensor, tables))
    for layer in encoder.layers:
        layer.input_layernorm = RMSNorm(layer.input_layernorm)
        layer.post_attention_layernorm = RMSNorm(layer.post_attention_layernorm)
        layer.self_attention.query_key_value.bias_add = ops.BiasAdd()
        layer.self_attention = SelfAttention(layer.self_attention, tables)
        layer.mlp.activation_func = SwiGLU()
    encoder.final_layernorm = RMSNorm(encoder.final_layernorm)
    for parameter, name in names:  # a new parent prefixes them
        parameter.name = name
