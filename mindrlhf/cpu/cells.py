"""Replacements for MindFormers' cells in a GLM-4 that trains on a CPU, with the same results.

Weights and their names are the same, too. The cells save time and memory everywhere but in the
matrix products:

- MindSpore's CPU kernels of Add, Mul, Sub and Div take three times as long if an operand is
  broadcast, and never free four buffers of the size of their result. Here operands are tiled to the
  same shape first.
- Gradients are written by hand. They use what a layer keeps anyway, the inputs and outputs of its
  matrix products, and recompute attention probabilities, rotated queries and keys, and the parts of
  SwiGLU. ops.depend on the incoming gradient keeps the compiler from reusing, and so keeping, those
  of the forward pass.
- Key and value heads are not repeated: the queries of a group form one longer matrix.
- The rotation of neighboring pairs is a product with a signed permutation, which is exact.
"""
from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


class RMSNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, float32.

    Args:
        norm: MindFormers' ChatGLM2RMSNorm; its weight is reused.
    """

    def __init__(self, norm: nn.Cell):
        super().__init__()
        self.weight = norm.weight
        self.normalize = _Normalize(float(norm.eps))

    def construct(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        return self.normalize(x, self.weight)


class _Normalize(nn.Cell):
    """RMSNorm as a function of x and weight, with its gradient."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.tile, self.mean = ops.Tile(), ops.ReduceMean(keep_dims=True)

    def factor(self, x: Tensor) -> Tensor:
        """1 / root mean square of each row of (N, H), tiled to (N, H)."""
        return self.tile(ops.rsqrt(self.mean(ops.square(x), 1) + self.eps), (1, x.shape[1]))

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., H), (H,) -> (..., H)."""
        rows = x.reshape((-1, x.shape[-1]))
        scale = self.tile(weight.reshape((1, -1)), (rows.shape[0], 1))
        return (rows * self.factor(rows) * scale).reshape(x.shape)

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple:
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

    def __init__(self) -> None:
        super().__init__()
        self.split = ops.Split(axis=1, output_num=2)

    def construct(self, x: Tensor) -> Tensor:
        """(B, S, 2F) -> (B, S, F)."""
        gate, up = self.split(x.reshape((-1, x.shape[-1])))
        return (gate * ops.sigmoid(gate) * up).reshape((*x.shape[:-1], -1))

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """silu' = s (1 + gate (1 - s)), s the sigmoid of gate."""
        x = ops.depend(x, dout)
        gate, up = self.split(x.reshape((-1, x.shape[-1])))
        dout = dout.reshape(gate.shape)
        sigmoid = ops.sigmoid(gate)
        silu = gate * sigmoid
        by_gate = dout * up * (sigmoid + silu - silu * sigmoid)
        return (ops.concat((by_gate, dout * silu), 1).reshape(x.shape),)


class Attention(nn.Cell):
    """Queries, keys and values of all heads -> their context: rotation, softmax, weighted sum.

    Args:
        heads: number of query heads.
        groups: number of key heads, and of value heads.
    """

    def __init__(self, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups = heads, groups
        self.softmax, self.product = ops.Softmax(-1), ops.BatchMatMul()
        self.left, self.right = ops.BatchMatMul(transpose_a=True), ops.BatchMatMul(transpose_b=True)
        self.matmul, self.matmul_back = ops.MatMul(), ops.MatMul(transpose_b=True)
        all_heads = heads + 2 * groups
        self.split_all_heads, self.split_heads = ops.Split(2, all_heads), ops.Split(2, heads)
        self.split_all_rows, self.split_rows = ops.Split(1, all_heads), ops.Split(1, heads)

    def parts(self, qkv: Tensor, own: Tensor, swapped: Tensor, swap: Tensor) -> tuple:
        """Split and rotate the heads. Arguments as in construct().

        Returns:
            (queries (B, groups, heads / groups * S, D), keys (B, groups, S, D), values, alike).
        """
        batch, length, _ = qkv.shape
        width, rotated = own.shape[3], self.heads + self.groups
        heads = self.split_all_heads(qkv)
        turned = ops.concat(heads[:rotated], 1).reshape((batch, rotated, length, width))
        neighbor = self.matmul(turned.reshape((-1, width)), swap).reshape(turned.shape)
        turned = turned * own + neighbor * swapped
        queries = turned[:, :self.heads].reshape((batch, self.groups, -1, width))
        values = ops.concat(heads[rotated:], 1).reshape((batch, self.groups, length, width))
        return queries, turned[:, self.heads:], values

    def probabilities(self, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        """Softmax of the scores.

        Args:
            queries, keys: as parts() returns them.
            bias: (B, 1, S, S), added to the scores.

        Returns:
            (B, groups, heads / groups * S, S).
        """
        scores = self.right(queries, keys)
        return self.softmax(scores + ops.tile(bias, (1, self.heads, 1, 1)).reshape(scores.shape))

    def construct(self, qkv: Tensor, bias: Tensor, own: Tensor, swapped: Tensor,
                  swap: Tensor) -> Tensor:
        """
        Args:
            qkv: (B, S, (heads + 2 groups) D).
            bias: (B, 1, S, S), added to the scores.
            own, swapped, swap: what Rotation returns.

        Returns:
            (B, S, heads * D).
        """
        queries, keys, values = self.parts(qkv, own, swapped, swap)
        context = self.product(self.probabilities(queries, keys, bias), values)
        return ops.concat(self.split_rows(context.reshape((qkv.shape[0], -1, own.shape[3]))), 2)

    def bprop(self, qkv: Tensor, bias: Tensor, own: Tensor, swapped: Tensor, swap: Tensor,
              out: Tensor, dout: Tensor) -> tuple:
        """Gradient of qkv; the other inputs are constants.

        Softmax: ds = p (dp - sum(dp p)), where sum(dp p) = sum(dout out) of a head.
        """
        batch, length, _ = qkv.shape
        qkv, out = ops.depend(qkv, dout), ops.depend(out, dout)
        queries, keys, values = self.parts(qkv, own, swapped, swap)
        p = self.probabilities(queries, keys, bias)
        dout = ops.concat(self.split_heads(dout), 1).reshape(queries.shape)
        out = ops.concat(self.split_heads(out), 1).reshape(queries.shape)
        mean = ops.tile((dout * out).sum(3, keepdims=True), (1, 1, 1, length))
        by_scores = p * (self.right(dout, values) - mean)
        by_queries = self.product(by_scores, keys).reshape((batch, self.heads, length, -1))
        by_turned = ops.concat((by_queries, self.left(by_scores, queries)), 1)
        neighbor = (by_turned * swapped).reshape((-1, own.shape[3]))
        by_turned = by_turned * own + self.matmul_back(neighbor, swap).reshape(by_turned.shape)
        by_heads = ops.concat((by_turned, self.left(p, dout)), 1)
        by_heads = by_heads.reshape((batch, -1, own.shape[3]))
        return (ops.concat(self.split_all_rows(by_heads), 2), ops.zeros_like(bias),
                ops.zeros_like(own), ops.zeros_like(swapped), ops.zeros_like(swap))


class Rotation(nn.Cell):
    """Tables of the rotary embedding: a rotated head is head * own + (head @ swap) * swapped.

    They also scale the queries by width^-0.5. All layers share them.

    Args:
        cosines, sines: float (S, R / 2), of the first R channels of a head, pair by pair.
        heads: number of query heads.
        groups: number of key heads, and of value heads.
        width: D, channels of a head.
    """

    def __init__(self, cosines: np.ndarray, sines: np.ndarray, *, heads: int, groups: int,
                 width: int):
        super().__init__()
        length, pairs = cosines.shape
        fixed = width - 2 * pairs  # channels that are not rotated
        own = np.concatenate((np.repeat(cosines, 2, 1), np.ones((length, fixed))), 1)
        swapped = np.concatenate((np.repeat(sines, 2, 1), np.zeros((length, fixed))), 1)
        swap = np.zeros((width, width), np.float32)
        for pair in range(0, 2 * pairs, 2):
            swap[pair + 1, pair], swap[pair, pair + 1] = -1, 1
        self.own, self.swapped = ms.Tensor(own, ms.float32), ms.Tensor(swapped, ms.float32)
        self.swap, self.scale = ms.Tensor(swap), width**-0.5
        self.heads, self.groups = heads, groups

    def construct(self, positions: Tensor) -> tuple:
        """int32 (B, S) -> own, swapped (B, heads + groups, S, D), swap (D, D), all float32."""
        return self.by_head(self.own, positions), self.by_head(self.swapped, positions), self.swap

    def by_head(self, table: Tensor, positions: Tensor) -> Tensor:
        """(S, D), int32 (B, S) -> (B, heads + groups, S, D)."""
        rows = ops.gather(table, positions, 0).expand_dims(1)
        return ops.stop_gradient(ops.concat((
            ops.tile(rows * self.scale, (1, self.heads, 1, 1)),
            ops.tile(rows, (1, self.groups, 1, 1))), 1))


class SelfAttention(nn.Cell):
    """MindFormers' ChatGLM2SelfAttention around Attention.

    Args:
        attention: the cell to replace.
    """

    def __init__(self, attention: nn.Cell):
        super().__init__()
        self.query_key_value, self.dense = attention.query_key_value, attention.dense
        self.heads = attention.n_head
        self.attention = Attention(attention.n_head, attention.n_kv_head)

    def construct(self, hidden_states: Tensor, attention_mask: Tensor, rotary_pos_emb: Any,
                  batch_valid_length: Any = None, prefix_key_value: Any = None,
                  block_tables: Any = None, slot_mapping: Any = None) -> Tensor:
        """
        Args:
            hidden_states: (B, S, H).
            attention_mask: (B, 1, S, S), 1 where a position does not attend.
            rotary_pos_emb: what Rotation returns.
            batch_valid_length and the rest: not used; MindFormers passes them.

        Returns:
            (B, S, H).
        """
        own, swapped, swap = rotary_pos_emb
        bias = attention_mask.astype(ms.float32) * -10000.0
        qkv = self.query_key_value(hidden_states)
        return self.dense(self.attention(qkv, bias, own, swapped, swap))


def replace_cells(network: nn.Cell) -> None:
    """Replace MindFormers' cells by these, in place.

    Args:
        network: Glm4DPO in float32, without flash attention and key-value cache.
    """
    names = [(parameter, parameter.name) for parameter in network.get_parameters()]
    encoder, cache = network.transformer.encoder, network.transformer.freqs_mgr.cache.asnumpy()
    config = network.config
    network.rotary = Rotation(cache[..., 0], cache[..., 1], heads=config.num_attention_heads,
                              groups=config.multi_query_group_num, width=config.kv_channels)
    for layer in encoder.layers:
        layer.input_layernorm = RMSNorm(layer.input_layernorm)
        layer.post_attention_layernorm = RMSNorm(layer.post_attention_layernorm)
        layer.self_attention.query_key_value.bias_add = ops.BiasAdd()
        layer.self_attention = SelfAttention(layer.self_attention)
        layer.mlp.activation_func = SwiGLU()
    encoder.final_layernorm = RMSNorm(encoder.final_layernorm)
    for parameter, name in names:  # a new parent cell prefixes the names
        parameter.name = name
