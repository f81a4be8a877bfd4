"""Stand-ins for the NPU's operators: their contracts in NumPy, and prediction with a KV cache on
the golden case.
"""

import mindspore as ms
import numpy as np
import pytest
from conftest import load_model
from mindspore import nn, ops

from mindrlhf.cpu import operators

CACHED = {
    "model.model_config.use_past": True,
    "model.model_config.use_flash_attention": True,
    "model.model_config.block_size": 16,
    "model.model_config.num_blocks": 24,
    "model.model_config.seq_length": 64,
}
PAD, STOP = 316, [316, 323, 325]
B, HEADS, GROUPS, S, D = 2, 6, 2, 32, 16


@pytest.fixture(scope="module", params=[True, False], ids=["dynamic", "static"])
def cached(request, golden):
    """MindFormers' prediction network as on an NPU: flash attention, paged KV cache."""
    return load_model(
        golden, "predict", {**CACHED, "model.model_config.is_dynamic": request.param}
    ).set_train(False)


@pytest.fixture(scope="module")
def plain(golden):
    return load_model(golden, "predict", {"model.model_config.seq_length": 64}).set_train(False)


def answers(network, prompts, **options):
    """Tokens after each prompt, without padding: list of lists."""
    longest = max(map(len, prompts))
    padded = [prompt + [PAD] * (longest - len(prompt)) for prompt in prompts]
    outputs = network.generate(
        padded, max_new_tokens=16, pad_token_id=PAD, eos_token_id=STOP, **options
    )
    return [
        output[len(prompt) : len(prompt) + 16].tolist() for prompt, output in zip(prompts, outputs)
    ]


def test_greedy_with_a_cache_is_pytorchs(cached, expected):
    for pair in expected["pairs"][:4]:
        assert answers(cached, [pair["prompt_ids"]], do_sample=False) == [pair["greedy_16"]]


@pytest.mark.parametrize(
    "cached", [True], indirect=True
)  # a static graph takes batches of the first one's size only
def test_prompts_of_different_lengths_share_a_batch(cached, expected):
    pairs = sorted(expected["pairs"], key=lambda pair: len(pair["prompt_ids"]))
    pairs = [pairs[0], pairs[-1], pairs[3]]
    found = answers(cached, [pair["prompt_ids"] for pair in pairs], do_sample=False)
    for answer, pair in zip(found, pairs):  # the longest prompt's 16 tokens end the batch
        assert answer[:16] == pair["greedy_16"][: len(answer)]
        assert len(answer) >= 8


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"top_k": 5, "top_p": 1.0},
        {"top_k": 0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
    ],
)
def test_sampling_with_a_cache_is_that_without(cached, plain, expected, sampling):
    prompts = [expected["pairs"][0]["prompt_ids"]]
    options = {"do_sample": True, "seed": 7, "top_k": 0, "top_p": 1.0, **sampling}
    found = answers(cached, prompts, **options)
    assert found == answers(plain, prompts, **options) == answers(cached, prompts, **options)
    assert found != answers(cached, prompts, **{**options, "seed": 8})


def softmax(scores):
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


@pytest.fixture
def qkv():
    """Queries (B, HEADS, S, D), keys and values (B, GROUPS, S, D)."""
    random = np.random.default_rng(0)
    return [
        random.standard_normal((B, heads, S, D)).astype(np.float32)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def attention(qkv, hidden):
    """The formula; hidden is boolean (B, 1, S, S), True at masked positions."""
    query, key, value = (x.astype(np.float64) for x in qkv)
    key, value = (np.repeat(x, HEADS // GROUPS, 1) for x in (key, value))
    scores = np.where(hidden, -np.inf, query @ key.transpose(0, 1, 3, 2) / np.sqrt(D))
    return softmax(scores) @ value


def as_bsh(x):
    """(B, N, S, D) -> (B, S, N * D)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def flash(layout="BNSD", **options):
    return operators.FlashAttentionScore(
        HEADS, scale_value=D**-0.5, next_tokens=0, pre_tokens=65536, input_layout=layout, **options
    )


@pytest.mark.parametrize("layout", ["BNSD", "BSH"])
@pytest.mark.parametrize("dtype", [np.uint8, np.bool_])
def test_attention_looks_where_the_mask_is_0(qkv, layout, dtype):
    hidden = np.random.default_rng(1).random((B, 1, S, S)) < 0.5
    hidden[:, :, :, 0] = False
    inputs = qkv if layout == "BNSD" else [as_bsh(x) for x in qkv]
    *_, found = flash(layout)(
        *map(ms.Tensor, inputs), None, None, None, ms.Tensor(hidden.astype(dtype))
    )
    expected = attention(qkv, hidden)
    np.testing.assert_allclose(
        found.asnumpy(), expected if layout == "BNSD" else as_bsh(expected), atol=1e-5
    )


@pytest.mark.parametrize(
    ("boost", "hidden"),
    [("on", np.triu(np.ones((S, S), bool), 1)), ("off", np.zeros((S, S), bool))],
)
def test_without_a_mask_only_the_kernel_of_prediction_hides_the_future(
    qkv, boost, hidden, monkeypatch
):
    monkeypatch.setattr(ms.context, "get_jit_config", lambda: {"infer_boost": boost})
    *_, found = flash("BSH")(*[ms.Tensor(as_bsh(x)) for x in qkv])
    np.testing.assert_allclose(
        found.asnumpy(), as_bsh(attention(qkv, hidden[None, None])), atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"size": 24}, "multiple of 16, at most 512"),
        ({"size": 528}, "multiple of 16, at most 512"),
        ({"length": 24}, "multiples of 16"),
        ({"key": np.float16}, "of one type"),
        ({"query": np.int32, "key": np.int32}, "of one type"),
        ({"mask": np.float32}, "uint8 or bool"),
    ],
)
def test_attention_refuses_what_the_operator_refuses(change, part):
    length, size = change.get("length", S), change.get("size", D)
    query, key = (
        np.ones((1, heads, length, size), change.get(name, np.float32))
        for name, heads in (("query", HEADS), ("key", GROUPS))
    )
    mask = np.zeros((1, 1, length, length), change.get("mask", np.uint8))
    with pytest.raises((ValueError, TypeError), match=part):
        flash()(*map(ms.Tensor, (query, key, key)), None, None, None, ms.Tensor(mask))


@pytest.mark.parametrize("options", [{"keep_prob": 0.9}, {"sparse_mode": 2}])
def test_attention_has_no_dropout_and_no_compressed_mask(options):
    with pytest.raises(ValueError, match="has a stand-in for"):
        flash(**options)


class Normed(nn.Cell):
    """Sum of RmsNorm's output, to differentiate."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def construct(self, x, gamma):
        return self.norm(x, gamma)[0].sum()


def test_rms_norm_is_the_formula_with_its_gradient():
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    gamma = np.linspace(0.5, 2, 8, dtype=np.float32)
    norm, factor = (
        operators.RmsNorm(1e-5),
        1 / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5),
    )
    found, found_factor = norm(ms.Tensor(x), ms.Tensor(gamma))
    np.testing.assert_allclose(found.asnumpy(), x * factor * gamma, rtol=1e-5)
    np.testing.assert_allclose(found_factor.asnumpy(), factor, rtol=1e-5)
    gradient = ms.grad(Normed(norm))(ms.Tensor(x), ms.Tensor(gamma)).asnumpy()
    normal = x * factor
    np.testing.assert_allclose(
        gradient, factor * (gamma - normal * (gamma * normal).mean(-1, keepdims=True)), atol=1e-5
    )
    with pytest.raises(TypeError, match="of one type"):
        norm(ms.Tensor(x), ms.Tensor(gamma.astype(np.float16)))
    with pytest.raises(ValueError, match="above 0, at most 1"):
        operators.RmsNorm(0.0)


def test_rotation_turns_neighbours():
    """Two tokens, two heads of four channels: the first pair rotates by 90 degrees, the second
    stays.
    """
    cos = ms.Tensor([[0, 0, 1, 1]] * 2, ms.float32)
    sin = ms.Tensor([[1, 1, 0, 0]] * 2, ms.float32)
    x = ms.Tensor(np.arange(1, 17).reshape(1, 2, 8), ms.float32)
    query, key = operators.ApplyRotaryPosEmb(3)(
        x, x[:, :, :4], cos, sin, ms.Tensor([1, 2], ms.int32)
    )
    assert query.asnumpy().tolist() == [
        [[-2, 1, 3, 4, -6, 5, 7, 8], [-10, 9, 11, 12, -14, 13, 15, 16]]
    ]
    assert key.asnumpy().tolist() == [[[-2, 1, 3, 4], [-10, 9, 11, 12]]]
    with pytest.raises(ValueError, match="cos_format 3, not 0"):
        operators.ApplyRotaryPosEmb(0)


class Cached(nn.Cell):
    """Write tokens into a cache of six blocks of four slots, then let one query of each sequence
    attend to them.
    """

    def __init__(self):
        super().__init__()
        empty = np.full((6, 4, GROUPS, D), 1e4, np.float32)  # what is not written would stand out
        self.keys, self.values = (
            ms.Parameter(ms.Tensor(empty), "keys"),
            ms.Parameter(ms.Tensor(empty), "values"),
        )
        self.write, self.look = (
            operators.ReshapeAndCache(),
            operators.PagedAttention(HEADS, D**-0.5, GROUPS),
        )

    def construct(self, key, value, slots, query, tables, lengths):
        query = ops.depend(query, self.write(key, value, self.keys, self.values, slots))
        return self.look(query, self.keys, self.values, tables, lengths)


def test_paged_attention_looks_at_the_tokens_of_its_own_sequence():
    """Sequences of 7 and 5 tokens in blocks 3, 1 and 0, 5, with slots in any order; the rest is
    padding.
    """
    random = np.random.default_rng(0)
    tables, lengths = np.array([[3, 1, -1], [0, 5, -1]], np.int32), np.array([7, 5], np.int32)
    slots = [
        tables[row, place // 4] * 4 + place % 4 if place < lengths[row] else -1
        for row in range(2)
        for place in range(8)
    ]
    key, value = (random.standard_normal((2, 8, GROUPS * D)).astype(np.float32) for _ in range(2))
    query = random.standard_normal((2, 1, HEADS * D)).astype(np.float32)
    cell = Cached()
    found = cell(
        *map(ms.Tensor, (key, value, np.array(slots, np.int32), query, tables, lengths))
    ).asnumpy()
    for row, length in enumerate(lengths):
        keys, values = (x[row, :length].reshape(length, GROUPS, D) for x in (key, value))
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            weights = softmax(keys[:, group] @ query[row, 0].reshape(HEADS, D)[head] / np.sqrt(D))
            np.testing.assert_allclose(
                found[row, 0].reshape(HEADS, D)[head], weights @ values[:, group], atol=1e-5
            )
    stored = cell.keys.asnumpy().reshape(24, -1)
    assert (
        stored[[slot for slot in slots if slot >= 0]] == np.concatenate([key[0, :7], key[1, :5]])
    ).all()
    assert (np.delete(stored, [slot for slot in slots if slot >= 0], 0) == 1e4).all()


def test_top_k_and_arg_max():
    x = ms.Tensor([[0.5, 0.2, 0.4, 0.9], [0.4, 0.6, 0.5, 0.1]], ms.float32)
    values, places = operators.topk(x, 2, 1)
    assert places.asnumpy().tolist() == [[3, 0], [1, 2]]
    np.testing.assert_allclose(values.asnumpy(), [[0.9, 0.5], [0.6, 0.5]], rtol=1e-6)
    assert operators.argmax(x, -1).asnumpy().tolist() == [3, 1]
    with pytest.raises(ValueError, match="last axis"):
        operators.topk(x, 1, 0)
