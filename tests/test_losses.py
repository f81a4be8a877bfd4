import json
import math

import mindspore as ms
import numpy as np
import pytest
from conftest import ROOT
from mindspore import nn, ops

import mindrlhf.logps
from mindrlhf import schema
from mindrlhf.cpu import operators
from mindrlhf.losses import LOSSES, get_loss

TRL = json.loads((ROOT / "tests/golden/trl_losses.json").read_text())
BETA = TRL["beta"]


@pytest.fixture(autouse=True)
def _pynative():
    """Run operators one by one; other tests may have left graph mode on."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=mode)


def logratios(*, per_token=False):
    values = []
    for side in ("chosen", "rejected"):
        ratio = np.array(TRL[f"policy_{side}_logps"]) - np.array(TRL[f"ref_{side}_logps"])
        values.append(
            ms.Tensor(ratio / np.array(TRL[f"{side}_lengths"]) if per_token else ratio, ms.float32)
        )
    return values


def dpo_loss(chosen, rejected, *, beta, loss_type="sigmoid", label_smoothing=0.0):
    """The loss of each pair from its two log-ratios, as Glm4DPO computes it."""
    return get_loss(loss_type)(chosen - rejected, beta, label_smoothing)


def test_an_unknown_loss_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown loss_type 'sigmoidd'; known: sigmoid, robust, hinge, ipo"
    ):
        get_loss("sigmoidd")
    expected = schema.SCHEMA["dpo"]["loss_type"]("sigmoidd")
    assert (
        expected == f"one of {', '.join(LOSSES)}"
    )  # the YAML's check, which does without MindSpore, knows the same


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sigmoid", {}),
        ("hinge", {"loss_type": "hinge"}),
        ("ipo", {"loss_type": "ipo"}),
        ("robust_ls0.1", {"loss_type": "robust", "label_smoothing": 0.1}),
        ("robust_ls0.0", {"loss_type": "robust"}),
        (
            "cdpo_ls0.1 (formula from logps, older-TRL sigmoid+label_smoothing)",
            {"label_smoothing": 0.1},
        ),
    ],
)
def test_losses_are_trls(name, options):
    loss = dpo_loss(*logratios(per_token=name == "ipo"), beta=BETA, **options).asnumpy()
    np.testing.assert_allclose(loss, TRL["losses"][name]["per_pair_bs1"], rtol=1e-5)
    np.testing.assert_allclose(loss.mean(), TRL["losses"][name]["batch_mean"], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "at_minus_1e4", "at_plus_1e4"),
    [
        # beta 0.1: beta * logits = -+1000. softplus(1000) = 1000, softplus(-1000) = 0
        ({}, 1000, 0),
        ({"label_smoothing": 0.1}, 900, 100),  # 0.9 * 1000 and 0.1 * 1000
        (
            {"loss_type": "robust", "label_smoothing": 0.1},
            1125,
            -125,
        ),  # 0.9 * 1000 / 0.8, -0.1 * 1000 / 0.8
        ({"loss_type": "hinge"}, 1001, 0),
        ({"loss_type": "ipo"}, 10005.0**2, 9995.0**2),  # (logits - 1 / 0.2)^2
    ],
)
def test_extremes_are_finite(options, at_minus_1e4, at_plus_1e4):
    def loss(chosen):
        return dpo_loss(chosen, ops.zeros_like(chosen), beta=0.1, **options)

    for ratio, expected in ((-1e4, at_minus_1e4), (1e4, at_plus_1e4)):
        value, gradient = ms.value_and_grad(loss)(ms.Tensor([ratio], ms.float32))
        np.testing.assert_allclose(value.asnumpy(), [expected], rtol=1e-6)
        assert np.isfinite(gradient.asnumpy()).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            -0.1 / 2,
        ),  # -beta * sigmoid(0): were it 0, a policy that equals its reference would never move
        ({"label_smoothing": 0.1}, -0.1 * (0.9 - 0.1) / 2),
        ({"loss_type": "robust", "label_smoothing": 0.1}, -0.1 * (0.9 + 0.1) / 2 / 0.8),
        ({"loss_type": "hinge"}, -0.1),
        ({"loss_type": "ipo"}, -10.0),  # 2 * (0 - 1 / 0.2)
    ],
)
def test_gradient_where_policy_is_reference(options, expected):
    zero = ms.Tensor([0.0], ms.float32)
    gradient = ms.grad(lambda x: dpo_loss(x, ops.zeros_like(x), beta=0.1, **options))(zero)
    np.testing.assert_allclose(gradient.asnumpy(), [expected], rtol=1e-6)


def test_loss_of_a_policy_that_is_its_reference_is_ln_2():
    zero = ms.Tensor([0.0], ms.float32)
    np.testing.assert_allclose(dpo_loss(zero, zero, beta=0.1).asnumpy(), [math.log(2)], rtol=1e-6)


class Sum(nn.Cell):
    """A scalar of the log-probs, so that gradients can be compared."""

    def __init__(self, output_layer, **options):
        super().__init__()
        self.logps = mindrlhf.logps.SequenceLogps(output_layer, 11, **options)

    def construct(self, hidden, labels, answer_ids):
        logps = self.logps(hidden, labels, answer_ids, 3)
        return (logps * ms.Tensor([[1.0, 2.0, 3.0]])).sum(), logps


def log_softmax(logits):
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_chunks_round_the_label_s_logit_as_the_others():
    """Of a certain token, the normalizer is its own logit, rounded by a MatMul in half precision:
    an unrounded logit would leave the rounding error as its log-prob. Float16 stands for bfloat16.
    """
    random = np.random.default_rng(0)
    weight = random.normal(size=(11, 64)).astype("f2")
    labels = random.integers(0, 11, 500).astype("i4")
    hidden = (weight[labels] * random.uniform(0.5, 1.5, (500, 1))).astype("f2")
    output_layer = nn.Dense(64, 11, has_bias=False, dtype=ms.float16)
    output_layer.weight.set_data(ms.Tensor(weight))
    logps = mindrlhf.logps.FullVocabularyLogps(output_layer, 11, chunk_size=100, trained=False)
    found = logps(ms.Tensor(hidden), ms.Tensor(labels)).asnumpy()
    exact = log_softmax(hidden.astype("f8") @ weight.astype("f8").T)[range(500), labels]
    certain = exact > -1e-6
    assert certain.sum() > 400
    unrounded = np.einsum("nh,nh->n", hidden.astype("f8"), weight[labels].astype("f8"))
    assert np.abs(unrounded - unrounded.astype("f2"))[certain].max() > 5e-3
    assert np.abs(found[certain]).max() < 1e-3
    assert found.max() <= 0


def test_chunks_give_no_probability_above_1():
    """In float32, the label's logit and the same logit of the MatMul differ in their last bits."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(11, 256)).astype("f4")
    labels = random.integers(0, 11, 500).astype("i4")
    output_layer = nn.Dense(256, 11, has_bias=False)
    output_layer.weight.set_data(ms.Tensor(weight))
    logps = mindrlhf.logps.FullVocabularyLogps(output_layer, 11, chunk_size=100, trained=False)
    certain = weight[labels]
    assert (logps(ms.Tensor(certain), ms.Tensor(labels)).asnumpy() <= 0).all()
    broken = np.full_like(certain, np.nan)
    assert np.isnan(logps(ms.Tensor(broken), ms.Tensor(labels)).asnumpy()).all()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shards", [1, 3])  # 3: the form for a vocabulary spread over cards, on one
@pytest.mark.parametrize(
    "chunk_size", [0, 1, 4, 5, 14, 100]
)  # 14 positions: one, even, uneven, all, more than all
def test_sequence_logps_are_numpys_for_every_chunk_size(chunk_size, shards, trained):
    random = np.random.default_rng(0)
    hidden, weight = (
        random.normal(size=(2, 7, 6)).astype("f4"),
        random.normal(size=(11, 6)).astype("f4"),
    )
    labels = random.integers(0, 11, (2, 7)).astype("i4")
    answers = np.array([[0, 1, 1, 2, 2, 3, 0], [1, 1, 0, 1, 1, 1, 1]], "i4")
    output_layer = nn.Dense(6, 11, has_bias=False)
    output_layer.weight.set_data(ms.Tensor(weight))
    network = Sum(output_layer, chunk_size=chunk_size, vocab_shards=shards, trained=trained)
    if shards == 1:  # on Ascend a negative id is an error, here NaN
        network.logps.token_logps.blocks.segment_sum = operators.UnsortedSegmentSum()
    arguments = [ms.Tensor(x) for x in (hidden, labels, answers)]
    _, logps = network(*arguments)

    logits = hidden.astype("f8") @ weight.astype("f8").T
    picked = np.take_along_axis(log_softmax(logits), labels[..., None].astype(int), -1)[..., 0]
    expected = np.stack([(picked * (answers == k)).sum(1) for k in (1, 2, 3)], 1)
    np.testing.assert_allclose(logps.asnumpy(), expected, atol=1e-5)

    # d logp / d logits = onehot - softmax, weighted by the answer's factor
    factor = np.choose(answers, [0, 1, 2, 3])
    by_logits = (np.eye(11)[labels] - np.exp(log_softmax(logits))) * factor[..., None]
    by_hidden, (by_weight,) = ms.grad(
        lambda *x: network(*x)[0], 0, output_layer.trainable_params()
    )(*arguments)
    np.testing.assert_allclose(by_hidden.asnumpy(), by_logits @ weight, atol=1e-4)
    if trained:
        np.testing.assert_allclose(
            by_weight.asnumpy(), np.einsum("bsv,bsh->vh", by_logits, hidden), atol=1e-4
        )


class Launched(nn.Cell):
    """A loss in graph mode, as training launches it."""

    def __init__(self, loss_type):
        super().__init__()
        self.loss = get_loss(loss_type)

    def construct(self, logits):
        return self.loss(logits, 0.1, 0.1)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_has_the_same_bits_however_often_it_was_computed(loss_type):
    """MindSpore's own softplus changes its last bit with its fifth launch, for 5 pairs and more."""
    ms.set_context(mode=ms.GRAPH_MODE)
    for pairs in (1, 5, 6, 13, 66):
        logits = ms.Tensor(np.random.default_rng(0).normal(0, 30, pairs), ms.float32)
        launched = Launched(loss_type)
        assert len({launched(logits).asnumpy().tobytes() for _ in range(40)}) == 1, pairs


def test_log_probs_in_chunks_have_the_same_bits_however_often_they_were_computed():
    generator = np.random.default_rng(0)
    layer = nn.Dense(8, 40, has_bias=False)
    hidden = ms.Tensor(generator.normal(size=(100, 8)), ms.float32)
    labels = ms.Tensor(generator.integers(0, 40, 100), ms.int32)
    ms.set_context(mode=ms.GRAPH_MODE)
    logps = mindrlhf.logps.FullVocabularyLogps(layer, 40, chunk_size=7, trained=True)
    assert len({logps(hidden, labels).asnumpy().tobytes() for _ in range(40)}) == 1
