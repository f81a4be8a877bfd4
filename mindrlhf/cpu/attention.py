"""Stand-ins for the Ascend operators of attention, see operators.py."""
from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

HIDDEN = -1e30  # added to scores of masked positions; exp of it is 0
NO_OUTPUT = Tensor([0.0], ms.float32)  # for outputs that are not used


def float_like(x: Tensor) -> bool:
    """Whether the operators take a tensor's dtype: half precision, or float32 for bfloat16."""
    return x.dtype in (ms.float16, ms.bfloat16, ms.float32)


class FlashAttentionScore(nn.Cell):
    """softmax(scale_value * query key^T, masked) value.

    Args:
        head_num: N1, query heads.
        keep_prob: 1.0; the stand-in has no dropout.
        scale_value: factor of the scores.
        pre_tokens, next_tokens: how far back and ahead a position looks.
        inner_precise: reserved.
        input_layout: "BNSD" or "BSH".
        sparse_mode: 0: the mask is given in full.

    Raises:
        ValueError: an argument has another value.
    """

    def __init__(self, head_num: int, keep_prob: float = 1.0, scale_value: float = 1.0,
                 pre_tokens: int = 2147483647, next_tokens: int = 2147483647,
                 inner_precise: int = 0, input_layout: str = "BSH", sparse_mode: int = 0):
        super().__init__()
        if keep_prob != 1.0 or sparse_mode != 0 or input_layout not in ("BNSD", "BSH"):
            raise ValueError(
                "FlashAttentionScore has a stand-in for keep_prob 1.0, sparse_mode 0 and the "
                f"layouts BNSD and BSH, not for {keep_prob}, {sparse_mode} and {input_layout}")
        self.heads, self.scale, self.bsh = head_num, scale_value, input_layout == "BSH"
        self.back, self.ahead = pre_tokens, next_tokens
        # Without a mask, the training kernel hides nothing; infer_boost's applies next_tokens.
        self.boosted = ms.context.get_jit_config().get("infer_boost") == "on"
        self.reshape, self.transpose, self.repeat = ops.Reshape(), ops.Transpose(), ops.Tile()
        self.scores, self.context = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.scaled, self.softmax = ops.Mul(), ops.Softmax(-1)
        self.cast, self.weaken, self.hide = ops.Cast(), ops.Mul(), ops.Add()

    def shard(self, strategies: tuple) -> FlashAttentionScore:
        """Split batch and heads over cards.

        Args:
            strategies: of query, key, value and attn_mask, as the operator takes them.
        """
        if self.bsh:  # the layout of prediction, which runs on one card
            return self
        query, key = strategies[:2]
        if query != key or query[2:] != (1, 1):
            raise ValueError(f"FlashAttentionScore has no stand-in for the strategies {strategies}")
        rows = (query[0], 1, 1, 1)
        for operator in (self.repeat, self.softmax):
            operator.shard((query,))
        for operator in (self.scores, self.context):
            operator.shard((query, query))
        self.scaled.shard((query, ()))
        self.cast.shard((rows,))
        self.weaken.shard((rows, ()))
        self.hide.shard((query, rows))
        return self

    def construct(self, query: Tensor, key: Tensor, value: Tensor, real_shift: Any = None,
                  drop_mask: Any = None, padding_mask: Any = None, attn_mask: Any = None,
                  prefix: Any = None, actual_seq_qlen: Any = None,
                  actual_seq_kvlen: Any = None) -> tuple:
        """
        Args:
            query: (B, N1, S1, D), or (B, S1, N1 * D).
            key, value: (B, N2, S2, D), or (B, S2, N2 * D); N2 divides N1.
            attn_mask: uint8 or bool (B, 1, S1, S2), 1 where not to look; None: see __init__.
            real_shift, drop_mask, padding_mask, prefix: None.
            actual_seq_qlen, actual_seq_kvlen: not used in these layouts.

        Returns:
            (three outputs that are not used, the context in shape and dtype of query).

        Raises:
            TypeError: a dtype that the operator rejects.
            ValueError: a shape or argument that the operator rejects or the stand-in lacks.
        """
        if not (real_shift is None and drop_mask is None and padding_mask is None
                and prefix is None):
            raise ValueError("FlashAttentionScore: real_shift, drop_mask, padding_mask and prefix "
                             "have no stand-in")
        if not float_like(query) or query.dtype != key.dtype or query.dtype != value.dtype:
            raise TypeError("FlashAttentionScore: query, key and value must be of one type, "
                            "float16 or bfloat16")
        size = query.shape[-1] // self.heads if self.bsh else query.shape[-1]
        if size % 16 or size > 512:
            raise ValueError("FlashAttentionScore: the head size must be a multiple of 16, at most "
                             "512")
        shape = ops.shape(query)
        if self.bsh:
            query, key = self.by_head(query, size), self.by_head(key, size)
            value = self.by_head(value, size)
        scores = self.scores(query, self.repeated(key)).astype(ms.float32)
        scores = self.masked(self.scaled(scores, self.scale), attn_mask)
        context = self.context(self.softmax(scores).astype(value.dtype), self.repeated(value))
        if self.bsh:
            context = self.reshape(self.transpose(context, (0, 2, 1, 3)), shape)
        return NO_OUTPUT, NO_OUTPUT, NO_OUTPUT, context

    def masked(self, scores: Tensor, mask: Any) -> Tensor:
        """Scores (B, N1, S1, S2), masked by the mask or, with infer_boost, by the band."""
        if mask is None:
            return scores + self.band(scores) if self.boosted else scores
        if mask.dtype not in (ms.uint8, ms.bool_):
            raise TypeError("FlashAttentionScore: attn_mask must be uint8 or bool, 1 where not to "
                            "look")
        if scores.shape[2] % 16 or scores.shape[3] % 16:
            raise ValueError("FlashAttentionScore: sequence lengths must be multiples of 16")
        return self.hide(scores, self.weaken(self.cast(mask, ms.float32), HIDDEN))

    def band(self, scores: Tensor) -> Tensor:
        """HIDDEN at positions over pre_tokens back or next_tokens ahead, else 0: (S1, S2)."""
        _, _, rows, columns = ops.shape(scores)
        ahead = ops.arange(columns).reshape((1, -1)) - ops.arange(rows).reshape((-1, 1))
        return ops.logical_or(ahead > self.ahead, ahead < -self.back).astype(ms.float32) * HIDDEN

    def by_head(self, x: Tensor, size: int) -> Tensor:
        """(B, S, N * D) -> (B, N, S, D)."""
        batch, length, _ = ops.shape(x)
        heads = self.reshape(x, (batch, length, x.shape[-1] // size, size))
        return self.transpose(heads, (0, 2, 1, 3))

    def repeated(self, x: Tensor) -> Tensor:
        """(B, N2, S2, D) -> (B, N1, S2, D): each key-value head for its query heads."""
        groups = x.shape[1]
        if groups == self.heads:
            return x
        batch, _, length, size = ops.shape(x)
        if self.heads % groups:
            raise ValueError("FlashAttentionScore: the key-value heads must divide the query heads")
        flat = self.reshape(x, (batch, groups, 1, length * size))
        wide = self.repeat(flat, (1, 1, self.heads // groups, 1))
        return self.reshape(wide, (batch, self.heads, length, size))


class ApplyRotaryPosEmb(nn.Cell):
    """Rotate each pair of neighbouring channels of queries and keys.

    Args:
        cos_format: 3: cos and sin are (B * S, D), each angle twice in a row.

    Raises:
        ValueError: another cos_format.
    """

    def __init__(self, cos_format: int = 0):
        super().__init__()
        if cos_format != 3:
            raise ValueError(f"ApplyRotaryPosEmb has a stand-in for cos_format 3, not {cos_format}")

    def shard(self, strategies: tuple) -> ApplyRotaryPosEmb:
        """Prediction runs on one card."""
        return self

    def construct(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor,
                  position_ids: Tensor) -> tuple:
        """
        Args:
            query, key: (B, S, N * D).
            cos, sin: (B * S, D), float32 or of query's dtype.
            position_ids: int; not used in this format.

        Returns:
            (query, key), rotated.

        Raises:
            TypeError: a dtype that the operator rejects.
        """
        if not float_like(query) or query.dtype != key.dtype or cos.dtype != sin.dtype or (
                cos.dtype != ms.float32 and cos.dtype != query.dtype):
            raise TypeError("ApplyRotaryPosEmb: query and key must be of one half-precision type, "
                            "cos and sin of that type or float32")
        return self.rotated(query, cos, sin), self.rotated(key, cos, sin)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(a, b) -> (a cos - b sin, b cos + a sin) of each pair of channels."""
        shape, size = ops.shape(x), cos.shape[-1]
        heads = x.reshape((-1, x.shape[-1] // size, size // 2, 2)).astype(ms.float32)
        swapped = ops.stack((-heads[..., 1], heads[..., 0]), -1)
        cos, sin = (table.reshape((-1, 1, size // 2, 2)).astype(ms.float32) for table in (cos, sin))
        return (heads * cos + swapped * sin).astype(x.dtype).reshape(shape)


class ReshapeAndCache(nn.Cell):
    """Write keys and values of tokens into their slots of the caches, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.write = ops.ScatterNdUpdate()

    def shard(self, strategies: tuple) -> ReshapeAndCache:
        """Prediction runs on one card."""
        return self

    def construct(self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
                  slot_mapping: Tensor) -> Tensor:
        """
        Args:
            key, value: (B, S, N * D), or (tokens, N, D).
            key_cache, value_cache: Parameters (blocks, block size, N, D), of key's dtype.
            slot_mapping: int32 (tokens,), block * block size + offset in the block; negative for
                padding tokens.

        Returns:
            key, after the caches have been written.

        Raises:
            TypeError: keys, values and caches differ in dtype.
        """
        if key.dtype != key_cache.dtype or value.dtype != value_cache.dtype:
            raise TypeError("ReshapeAndCache: keys, values and their caches must be of one type")
        _, block, heads, size = key_cache.shape
        # a padding token repeats the write of the first real token
        real = slot_mapping >= 0
        first = ops.argmax(real.astype(ms.int32), 0).astype(ms.int32)
        token = ops.where(real, ops.arange(slot_mapping.shape[0]).astype(ms.int32), first)
        slot = ops.gather(slot_mapping, token, 0)
        place = ops.stack((slot // block, slot % block), 1)
        keys, values = (ops.gather(x.reshape((-1, heads, size)), token, 0) for x in (key, value))
        written = self.write(key_cache, place, keys), self.write(value_cache, place, values)
        return ops.depend(key, written)


class PagedAttention(nn.Cell):
    """Attention of one new token of each sequence over its cached keys and values.

    Args:
        head_num: number of query heads.
        scale_value: factor of the scores.
        kv_head_num: number of key-value heads.
    """

    def __init__(self, head_num: int, scale_value: float = 1.0, kv_head_num: int = 0):
        super().__init__()
        self.heads, self.scale, self.groups = head_num, scale_value, kv_head_num
        self.scores, self.context = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.softmax = ops.Softmax(-1)

    def shard(self, strategies: tuple) -> PagedAttention:
        """Prediction runs on one card."""
        return self

    def construct(self, query: Tensor, key_cache: Tensor, value_cache: Tensor,
                  block_tables: Tensor, context_lens: Tensor) -> Tensor:
        """
        Args:
            query: (B, 1, N1 * D).
            key_cache, value_cache: (blocks, block size, N2, D), of query's dtype.
            block_tables: int32 (B, blocks of the longest sequence), the blocks of each sequence in
                order; negative after its last one.
            context_lens: int32 (B,), tokens of each sequence, including the new one.

        Returns:
            The context, (B, 1, N1 * D).

        Raises:
            TypeError: a dtype that the operator rejects.
        """
        if (not float_like(query) or query.dtype != key_cache.dtype
                or query.dtype != value_cache.dtype):
            raise TypeError("PagedAttention: query and caches must be of one half-precision type")
        size = key_cache.shape[3]
        keys, values = self.cached(key_cache, block_tables), self.cached(value_cache, block_tables)
        queries = query.reshape((-1, self.groups, self.heads // self.groups, size))
        scores = self.scores(queries, keys).astype(ms.float32) * self.scale
        place = ops.arange(scores.shape[-1]).reshape((1, 1, 1, -1))
        unused = place >= context_lens.reshape((-1, 1, 1, 1))
        probabilities = self.softmax(scores + unused.astype(ms.float32) * HIDDEN)
        return self.context(probabilities.astype(query.dtype), values).reshape(ops.shape(query))

    def cached(self, cache: Tensor, block_tables: Tensor) -> Tensor:
        """Gather the sequences' blocks from a cache -> (B, N2, blocks * block size, D)."""
        _, block, groups, size = cache.shape
        rows = ops.gather(cache, ops.maximum(block_tables, 0), 0)  # (B, blocks, block size, N2, D)
        length = block_tables.shape[1] * block
        return rows.reshape((-1, length, groups, size)).transpose((0, 2, 1, 3))
