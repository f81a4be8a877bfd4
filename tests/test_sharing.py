"""Sharing changes nothing but time: log-probs, loss, metrics and gradients equal those of pairs
whose sequences each stand alone in a row.
"""

import math

import numpy as np
import pytest
from conftest import SEQ_LEN, load_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import nn, ops
from test_glm4_dpo import columns, token_pairs

from mindrlhf import runtime
from mindrlhf.data import mindrecord
from mindrlhf.data.features import TokenGroup, TokenPair
from mindrlhf.data.groups import find_sequences
from mindrlhf.data.reference import Scorer
from mindrlhf.records import SUMS, StepOutput
from mindrlhf.training.train_step import DPOTrainOneStepCell

ROWS, ANSWERS, PAIRS = 4, 24, 12  # of every batch here, so that one graph serves all
END = 323  # <|user|> of the golden tokenizer


def compare(prompt, ranked):
    """A prompt's pairs from indices of answers, best first in each."""
    answers = [[10, 200 + 5 * number, 120 + number, END] for number in range(10)]
    return [TokenPair(prompt, answers[better], answers[worse]) for better, worse in ranked]


@pytest.fixture(scope="module")
def cases(expected):
    """Pairs that share in every way there is."""
    golden = token_pairs(expected)
    prompts = [pair.prompt for pair in golden]
    return {
        "one pair a prompt": golden[:4],
        "three pairs of three answers": compare(prompts[0], [(0, 1), (1, 2), (0, 2)]),
        "ten answers": compare(prompts[1], [(k, k + 1) for k in range(0, 9)]),
        "chosen once, rejected once": compare(prompts[2], [(3, 4), (4, 3), (5, 4)]),
        "equal answers": compare(prompts[3], [(1, 1), (1, 2)]),
        "two prompts, equal answers": compare(prompts[4], [(0, 1)]) + compare(prompts[5], [(0, 1)]),
    }


def references_of(pairs):
    """Some reference log-probs, the same for the same answer."""
    return np.array(
        [
            [-20.0 - sum(pair.prompt + answer) % 7 for answer in (pair.chosen, pair.rejected)]
            for pair in pairs
        ]
    )


def batch(rows):
    """Rows filled up to a batch of one size."""
    sizes = {"seq_len": SEQ_LEN, "answers": ANSWERS, "pairs": PAIRS}
    filled = [mindrecord.make_row([], pad_id=316, **sizes) for _ in range(ROWS)]
    for row, empty in zip(rows, filled):
        for name, values in row.items():
            empty[name][: len(values)] = values
    return columns(filled)


def shared_batch(pairs):
    return batch(
        mindrecord.make_rows(pairs, references_of(pairs), seq_len=SEQ_LEN, pad_id=316, share=True)
    )


def unshared_batch(pairs):
    """Each sequence, prompt and one answer, is a group of its own, two for each pair."""
    rows, sizes = [], {"seq_len": SEQ_LEN, "answers": ANSWERS, "pairs": PAIRS}
    for begin in range(0, len(pairs), 3 if len(pairs) > ROWS else 1):
        some = pairs[begin : begin + (3 if len(pairs) > ROWS else 1)]
        logps = references_of(some)
        groups = [
            TokenGroup(pair.prompt, [answer], [], [logps[number, side]])
            for number, pair in enumerate(some)
            for side, answer in enumerate((pair.chosen, pair.rejected))
        ]
        row = mindrecord.make_row(groups, pad_id=316, **sizes)
        for number in range(len(some)):
            row["chosen"][number], row["rejected"][number] = 2 * number, 2 * number + 1
            row["pair_ids"][number] = begin + number
        rows.append(row)
    assert len(rows) <= ROWS
    return batch(rows)


class KeepGradients(nn.Optimizer):
    """Stores the gradients as the values of copies of the parameters."""

    def __init__(self, parameters):
        super().__init__(0.0, parameters)
        self.kept = self.parameters.clone(prefix="gradient", init="zeros")
        self.assign = ops.Assign()

    def construct(self, gradients):
        done = True
        for kept, gradient in zip(self.kept, gradients):
            done = ops.depend(done, self.assign(kept, gradient))
        return done


@pytest.fixture(
    scope="module",
    params=[("cpu", 1), ("cpu", 4), ("plan", 1)],
    ids=["the CPU's cells", "accumulated", "flash attention in a plan"],
)
def step(request, golden):
    """A training step: a batch -> (StepOutput, gradients by name)."""
    cells, accumulation = request.param
    more = {"dpo.sft_weight": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        if cells == "plan":
            patch.setattr(runtime, "is_sharded", lambda: True)
            more |= {"model.model_config.use_flash_attention": True, "dpo.logps_chunk_size": 500}
        network = load_model(golden, "finetune", more).set_train(True)
    optimizer = KeepGradients(network.trainable_params())
    cell = DPOTrainOneStepCell(network, optimizer, 1e9, accumulation)

    def run(batch):
        outputs = StepOutput(*cell(*batch))
        return outputs, {kept.name: kept.asnumpy() for kept in optimizer.kept}

    return run


@pytest.mark.parametrize(
    "case",
    [
        "one pair a prompt",
        "three pairs of three answers",
        "ten answers",
        "chosen once, rejected once",
        "equal answers",
        "two prompts, equal answers",
    ],
)
def test_loss_metrics_and_gradients_are_those_of_the_pairs_unshared(step, cases, case):
    pairs = cases[case]
    shared, gradients = step(shared_batch(pairs))
    unshared, expected_gradients = step(unshared_batch(pairs))
    assert float(shared.loss) == pytest.approx(float(unshared.loss), rel=1e-5)
    assert float(shared.grad_norm) == pytest.approx(float(unshared.grad_norm), rel=1e-5)
    for name, value, wanted in zip(SUMS, shared.sums.asnumpy(), unshared.sums.asnumpy()):
        if name == "tokens":  # what sharing saves
            sequences = sum(
                2 * len(pair.prompt) - 2 + len(pair.chosen + pair.rejected) for pair in pairs
            )
            assert wanted == sequences
            assert value <= sum(pair.size for pair in pairs) < wanted
        elif name == "correct" and case == "equal answers":
            assert value == 0  # a tie is not accurate; unshared, rounding may break it
        else:
            assert value == pytest.approx(wanted, rel=1e-5, abs=1e-4), name
    for name, wanted in expected_gradients.items():
        np.testing.assert_allclose(
            gradients[name], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name
        )


@pytest.fixture(scope="module")
def scorer(golden):
    return Scorer(load_model(golden, "process"), seq_len=SEQ_LEN, batch_size=2, pad_id=316)


def test_a_shared_prompt_scores_as_pytorch_does(scorer, expected):
    """Each golden answer among seven others to its prompt is within 3e-4 of PyTorch's log-prob."""
    pairs = token_pairs(expected)
    others = [pair.rejected for pair in pairs if len(pair.rejected) < 40]
    for pair, wanted in zip(pairs, expected["pairs"]):
        company = [TokenPair(pair.prompt, pair.chosen, other) for other in others]
        logps = scorer.score_pairs([*company, pair])
        answers = wanted["ref_chosen_logps"], wanted["ref_rejected_logps"]
        assert np.abs(logps[-1] - answers).max() < 3e-4
        assert np.ptp(logps[:, 0]) == 0  # the chosen answer was scored once


def test_at_step_0_the_loss_is_ln_2(step, scorer, cases):
    pairs = [pair for pairs in cases.values() for pair in pairs][:12]
    rows = mindrecord.make_rows(
        pairs, scorer.score_pairs(pairs), seq_len=SEQ_LEN, pad_id=316, share=True
    )
    outputs, _ = step(batch(rows))
    sums = outputs.sums.asnumpy()
    sft = sums[SUMS.index("sft_nll")] / sums[SUMS.index("chosen_tokens")]
    assert sums[SUMS.index("pairs")] == 12
    assert float(outputs.loss) - 0.5 * sft == pytest.approx(math.log(2), abs=1e-4)


PROMPTS = st.lists(st.integers(0, 255), min_size=1, max_size=3).map(lambda ids: [318, 320, *ids])
RESPONSES = st.lists(st.integers(0, 255), min_size=1, max_size=30).map(lambda ids: [*ids, END])


@st.composite
def any_pairs(draw):
    prompts = draw(st.lists(PROMPTS, min_size=1, max_size=3))
    answers = draw(st.lists(RESPONSES, min_size=1, max_size=6))
    return draw(
        st.lists(
            st.builds(
                TokenPair, *(st.sampled_from(texts) for texts in (prompts, answers, answers))
            ),
            min_size=1,
            max_size=12,
        )
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_pairs())
def test_any_pairs_score_as_they_do_alone(scorer, pairs):
    shared = scorer.score_pairs(pairs)
    found = find_sequences(pairs, share=False)
    apart = scorer(found)[np.array(found.pairs)]
    np.testing.assert_allclose(shared, apart, rtol=1e-5, atol=1e-4)
    # one of them alone in its row, each of its answers with the prompt as a group of its own
    pair = pairs[-1]
    groups = [TokenGroup(pair.prompt, [answer]) for answer in (pair.chosen, pair.rejected)]
    alone = scorer._run([[group] for group in groups])[:, 0]
    np.testing.assert_allclose(shared[-1], alone, rtol=1e-5, atol=1e-4)


def test_a_pair_with_an_infinite_reference_names_no_other(step):
    """Three pairs share a row, two of them an answer."""
    pairs = compare([318, 320, 65], [(0, 1), (2, 3), (4, 3)])
    rows = mindrecord.make_rows(pairs, references_of(pairs), seq_len=SEQ_LEN, pad_id=316)
    rows[0]["reference_logps"][rows[0]["rejected"][1]] = -np.inf
    outputs, _ = step(batch(rows))
    assert bool(outputs.overflow)
    faulty = outputs.faulty.asnumpy()
    assert faulty[faulty >= 0].tolist() == [1, 2]
