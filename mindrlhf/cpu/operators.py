"""Stand-ins, in plain operators, for the Ascend operators in MindFormers' GLM-4, so that its NPU network runs on a CPU.

MindFormers builds its cells as on an NPU; after install() the operators' names mean the classes below. Each one
takes the operator's arguments, keeps its documented contract, refuses what the operator refuses, and can be sharded.

| operator | who calls it | source of the contract (MindSpore 2.4.10) |
|---|---|---|
| FlashAttentionScore | training, preprocessing; prefill with a KV cache | op_def/yaml/doc/flash_attention_score_doc.yaml |
| UnsortedSegmentSum | gradient of the log-probs | op_def/yaml/doc/unsorted_segment_sum_doc.yaml |
| RmsNorm | every layer | op_def/yaml/doc/rms_norm_doc.yaml |
| ApplyRotaryPosEmb | prediction with a KV cache | infer/ops_func_impl/apply_rotary_pos_emb.cc; its test |
| ReshapeAndCache | the same | op_def/yaml/doc/reshape_and_cache_doc.yaml; its test |
| PagedAttention | the same | op_def/yaml/doc/paged_attention_doc.yaml; its test |
| ArgMaxExt, TopkExt, CumsumExt | greedy and sampled tokens | op_def/yaml/doc/{argmax,topk,cumsum}_ext_doc.yaml |
| SortExt | sampled tokens | ops/function/array_func.py, sort_ext |

The tests named are tests/st/ops/ascend/test_internal_ops/*.py of the same source. The NPU's overflow registers have no
stand-in: the training step does not read them (see training/wrapper.py).

A CPU has no bfloat16 kernels, so float32 takes its place here. On an NPU those of attention and cache refuse float32,
and so does mindrlhf.config.
"""
from __future__ import annotations

import importlib
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

HIDDEN = -1e30  # added to scores that must not count: exp of it is 0
UNSORTED_SEGMENT_SUM = ops.UnsortedSegmentSum
NO_OUTPUT = Tensor([0.0], ms.float32)  # for outputs that nobody reads


def float_like(x: Tensor) -> bool:
    """Whether the operators take a tensor's type: a half-precision one, or float32 in the place of bfloat16."""
    return x.dtype in (ms.float16, ms.bfloat16, ms.float32)


class FlashAttentionScore(nn.Cell):
    """softmax(scale_value * query key^T, masked) value.

    Args:
        head_num: N1, query heads.
        keep_prob: 1.0; dropout has no stand-in.
        scale_value: factor of the scores.
        pre_tokens, next_tokens: how far back and ahead a position looks.
        inner_precise: reserved.
        input_layout: "BNSD" or "BSH".
        sparse_mode: 0: the mask is given in full.
    """

    def __init__(self, head_num: int, keep_prob: float = 1.0, scale_value: float = 1.0, pre_tokens: int = 2147483647,
                 next_tokens: int = 2147483647, inner_precise: int = 0, input_layout: str = "BSH", sparse_mode: int = 0):
        super().__init__()
        if keep_prob != 1.0 or sparse_mode != 0 or input_layout not in ("BNSD", "BSH"):
            raise ValueError(f"FlashAttentionScore has a stand-in for keep_prob 1.0, sparse_mode 0 and the layouts BNSD and "
                             f"BSH, not for {keep_prob}, {sparse_mode} and {input_layout}")
        self.heads, self.scale, self.bsh = head_num, scale_value, input_layout == "BSH"
        self.back, self.ahead = pre_tokens, next_tokens
        # without a mask the training kernel hides nothing, and that of infer_boost what next_tokens excludes
        self.boosted = ms.context.get_jit_config().get("infer_boost") == "on"
        self.reshape, self.transpose, self.repeat = ops.Reshape(), ops.Transpose(), ops.Tile()
        self.scores, self.context = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.scaled, self.softmax = ops.Mul(), ops.Softmax(-1)
        self.cast, self.weaken, self.hide = ops.Cast(), ops.Mul(), ops.Add()

    def shard(self, strategies: tuple) -> FlashAttentionScore:
        """Split batch and heads over cards. strategies: of query, key, value and attn_mask, as the operator takes them."""
        if self.bsh:  # of prediction, which runs on one card
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

    def construct(self, query: Tensor, key: Tensor, value: Tensor, real_shift: Any = None, drop_mask: Any = None,
                  padding_mask: Any = None, attn_mask: Any = None, prefix: Any = None, actual_seq_qlen: Any = None,
                  actual_seq_kvlen: Any = None) -> tuple:
        """
        Args:
            query: (B, N1, S1, D), or (B, S1, N1 * D).
            key, value: (B, N2, S2, D), or (B, S2, N2 * D); N2 divides N1.
            attn_mask: uint8 or bool (B, 1, S1, S2), 1 where not to look; None: see __init__.
            real_shift, drop_mask, padding_mask, prefix: None.
            actual_seq_qlen, actual_seq_kvlen: not read in these layouts.

        Returns:
            (three outputs that nobody reads, the context: shape and type of query).
        """
        if not (real_shift is None and drop_mask is None and padding_mask is None and prefix is None):
            raise ValueError("FlashAttentionScore: real_shift, drop_mask, padding_mask and prefix have no stand-in")
        if not float_like(query) or query.dtype != key.dtype or query.dtype != value.dtype:
            raise TypeError("FlashAttentionScore: query, key and value must be of one type, float16 or bfloat16")
        size = query.shape[-1] // self.heads if self.bsh else query.shape[-1]
        if size % 16 or size > 512:
            raise ValueError("FlashAttentionScore: the head size must be a multiple of 16, at most 512")
        shape = ops.shape(query)
        if self.bsh:
            query, key, value = self.by_head(query, size), self.by_head(key, size), self.by_head(value, size)
        scores = self.scores(query, self.repeated(key)).astype(ms.float32)
        scores = self.masked(self.scaled(scores, self.scale), attn_mask)
        context = self.context(self.softmax(scores).astype(value.dtype), self.repeated(value))
        if self.bsh:
            context = self.reshape(self.transpose(context, (0, 2, 1, 3)), shape)
        return NO_OUTPUT, NO_OUTPUT, NO_OUTPUT, context

    def masked(self, scores: Tensor, mask: Any) -> Tensor:
        """Scores (B, N1, S1, S2) without those that the mask or, with infer_boost, the band excludes."""
        if mask is None:
            return scores + self.band(scores) if self.boosted else scores
        if mask.dtype not in (ms.uint8, ms.bool_):
            raise TypeError("FlashAttentionScore: attn_mask must be uint8 or bool, 1 where not to look")
        if scores.shape[2] % 16 or scores.shape[3] % 16:
            raise ValueError("FlashAttentionScore: sequence lengths must be multiples of 16")
        return self.hide(scores, self.weaken(self.cast(mask, ms.float32), HIDDEN))

    def band(self, scores: Tensor) -> Tensor:
        """What hides positions more than pre_tokens back or next_tokens ahead: float32 (S1, S2)."""
        _, _, rows, columns = ops.shape(scores)
        ahead = ops.arange(columns).reshape((1, -1)) - ops.arange(rows).reshape((-1, 1))
        return ops.logical_or(ahead > self.ahead, ahead < -self.back).astype(ms.float32) * HIDDEN

    def by_head(self, x: Tensor, size: int) -> Tensor:
        """(B, S, N * D) -> (B, N, S, D)."""
        batch, length, _ = ops.shape(x)
        return self.transpose(self.reshape(x, (batch, length, x.shape[-1] // size, size)), (0, 2, 1, 3))

    def repeated(self, x: Tensor) -> Tensor:
        """(B, N2, S2, D) -> (B, N1, S2, D): each key-value head for its query heads."""
        groups = x.shape[1]
        if groups == self.heads:
            return x
        batch, _, length, size = ops.shape(x)
        if self.heads % groups:
            raise ValueError("FlashAttentionScore: the key-value heads must divide the query heads")
        wide = self.repeat(self.reshape(x, (batch, groups, 1, length * size)), (1, 1, self.heads // groups, 1))
        return self.reshape(wide, (batch, self.heads, length, size))


class UnsortedSegmentSum(nn.Cell):
    """Sum of the rows of each segment. The CPU has a kernel, which passes over negative ids; on Ascend they are an
    execution error, and here the result is NaN."""

    def __init__(self):
        super().__init__()
        self.sum = UNSORTED_SEGMENT_SUM()

    def construct(self, x: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
        """x (N, ...), segment_ids int32 (N,) -> (num_segments, ...)."""
        return self.sum(x, segment_ids, num_segments) + ops.where((segment_ids < 0).any(), float("nan"), 0.0)


class RmsNorm(nn.Cell):
    """x / sqrt(mean(x^2) + epsilon) * gamma over the last axis.

    Args:
        epsilon: above 0, at most 1.
    """

    def __init__(self, epsilon: float = 1e-6):
        super().__init__()
        if not 0 < epsilon <= 1:
            raise ValueError(f"RmsNorm: epsilon is {epsilon}; a number above 0, at most 1, expected")
        self.epsilon = epsilon
        self.square, self.mean, self.add, self.rsqrt = ops.Square(), ops.ReduceMean(keep_dims=True), ops.Add(), ops.Rsqrt()
        self.normalize, self.weigh = ops.Mul(), ops.Mul()

    def shard(self, strategies: tuple) -> RmsNorm:
        """Split all axes of x but the last. strategies: of x and gamma."""
        x, gamma = strategies
        for operator in (self.square, self.mean, self.rsqrt):
            operator.shard((x,))
        self.add.shard((x, ()))
        self.normalize.shard((x, x))
        self.weigh.shard((x, gamma))
        return self

    def construct(self, x: Tensor, gamma: Tensor) -> tuple:
        """x (..., H), gamma (H,), of one type -> (normalized x, 1 / root mean square (..., 1))."""
        if not float_like(x) or x.dtype != gamma.dtype:
            raise TypeError("RmsNorm: x and gamma must be of one type, float16, bfloat16 or float32")
        factor = self.rsqrt(self.add(self.mean(self.square(x), -1), self.epsilon))
        return self.weigh(self.normalize(x, factor), gamma), factor


class ApplyRotaryPosEmb(nn.Cell):
    """Rotate each pair of neighbouring channels of queries and keys.

    Args:
        cos_format: 3: cos and sin are (B * S, D), each angle twice in a row.
    """

    def __init__(self, cos_format: int = 0):
        super().__init__()
        if cos_format != 3:
            raise ValueError(f"ApplyRotaryPosEmb has a stand-in for cos_format 3, not {cos_format}")

    def shard(self, strategies: tuple) -> ApplyRotaryPosEmb:
        """Prediction runs on one card."""
        return self

    def construct(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple:
        """
        Args:
            query, key: (B, S, N * D).
            cos, sin: float32, or of the type of query; (B * S, D).
            position_ids: int; not read in this format.

        Returns:
            (query, key), rotated.
        """
        if not float_like(query) or query.dtype != key.dtype or cos.dtype != sin.dtype or (
                cos.dtype != ms.float32 and cos.dtype != query.dtype):
            raise TypeError("ApplyRotaryPosEmb: query and key must be of one half-precision type, cos and sin of it or float32")
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

    def __init__(self):
        super().__init__()
        self.write = ops.ScatterNdUpdate()

    def shard(self, strategies: tuple) -> ReshapeAndCache:
        """Prediction runs on one card."""
        return self

    def construct(self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> Tensor:
        """
        Args:
            key, value: (B, S, N * D), or (tokens, N, D).
            key_cache, value_cache: Parameters (blocks, block size, N, D), of the type of key.
            slot_mapping: int32 (tokens,), block * block size + place in it; below 0: the token is padding.

        Returns:
            key, once the caches are written.
        """
        if key.dtype != key_cache.dtype or value.dtype != value_cache.dtype:
            raise TypeError("ReshapeAndCache: keys, values and their caches must be of one type")
        _, block, heads, size = key_cache.shape
        # a padding token writes what the first real one writes, where that one does
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
        head_num: query heads.
        scale_value: factor of the scores.
        kv_head_num: key-value heads.
    """

    def __init__(self, head_num: int, scale_value: float = 1.0, kv_head_num: int = 0):
        super().__init__()
        self.heads, self.scale, self.groups = head_num, scale_value, kv_head_num
        self.scores, self.context, self.softmax = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul(), ops.Softmax(-1)

    def shard(self, strategies: tuple) -> PagedAttention:
        """Prediction runs on one card."""
        return self

    def construct(self, query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor,
                  context_lens: Tensor) -> Tensor:
        """
        Args:
            query: (B, 1, N1 * D).
            key_cache, value_cache: (blocks, block size, N2, D), of the type of query.
            block_tables: int32 (B, most blocks), a sequence's blocks in order; below 0: none.
            context_lens: int32 (B,), tokens of each sequence, the new one included.

        Returns:
            The context, (B, 1, N1 * D).
        """
        if not float_like(query) or query.dtype != key_cache.dtype or query.dtype != value_cache.dtype:
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
        """A cache and the sequences' blocks in it -> (B, N2, blocks * block size, D)."""
        _, block, groups, size = cache.shape
        rows = ops.gather(cache, ops.maximum(block_tables, 0), 0)  # (B, blocks, block size, N2, D)
        length = block_tables.shape[1] * block
        return rows.reshape((-1, length, groups, size)).transpose((0, 2, 1, 3))


def argmax(x: Tensor, dim: int = -1) -> Tensor:
    """Index of the largest value along an axis; ArgMaxExt has no CPU kernel."""
    return ops.argmax(x, dim)


def topk(x: Tensor, k: int, dim: int = -1) -> tuple:
    """The k largest values along the last axis and their indices; TopkExt has no CPU kernel."""
    if dim not in (-1, x.ndim - 1):
        raise ValueError(f"topk has a stand-in for the last axis, not {dim}")
    return ops.topk(x, k)


def sort(x: Tensor, *, dim: int = -1, descending: bool = False, stable: bool = False) -> tuple:
    """Values along the last axis in order, and their indices; SortExt has no CPU kernel."""
    if dim not in (-1, x.ndim - 1):
        raise ValueError(f"sort has a stand-in for the last axis, not {dim}")
    return ops.sort(x, dim, descending)


def cumsum(x: Tensor, dim: int) -> Tensor:
    """Sums of the values up to each place of an axis; CumsumExt has no CPU kernel."""
    return ops.cumsum(x, dim)


# where MindFormers takes each operator from -> the stand-in
REPLACED = {"mindformers.modules.flash_attention.FlashAttentionScore": FlashAttentionScore,
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
    """Let the operators' names mean their stand-ins in this process, for all that MindFormers builds from now on."""
    for path, stand_in in REPLACED.items():
        module, name = path.rsplit(".", 1)
        setattr(importlib.import_module(module), name, stand_in)
