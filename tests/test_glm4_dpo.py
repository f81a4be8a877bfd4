"""Glm4DPO and MindFormers' predict network on the golden case, and corrections they need."""

import json

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, SEQ_LEN, load_model
from mindspore import nn, ops

from mindrlhf.cpu import operators, patches
from mindrlhf.data import mindrecord
from mindrlhf.data.features import TokenPair
from mindrlhf.records import COLUMNS


@pytest.fixture(scope="module")
def training_model(golden):
    return load_model(golden, "finetune").set_train(False)


@pytest.fixture(scope="module")
def predict_model(golden):
    return load_model(golden, "predict", {"model.model_config.seq_length": 64}).set_train(False)


class Logits(nn.Cell):
    """Logits at every position, as the training model computes them."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, input_ids, group_ids, answer_ids, positions):
        hidden = self.model.hidden_states(input_ids, group_ids, answer_ids, positions)
        return self.model.transformer.output_layer(hidden)


POSITIONS = np.arange(SEQ_LEN, dtype=np.int32).reshape(1, -1)


def move_last(logits_of, length, vocabulary=330):
    """Largest changes when the last token changes: of the logits before the last position, and of
    the last ones.
    """
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, length)).astype(np.int32)
    before = logits_of(ids)
    ids[0, -1] = (ids[0, -1] + 1) % vocabulary
    change = np.abs(logits_of(ids) - before)[0]
    return change[:-1].max(), change[-1].max()


def test_training_model_is_causal(training_model):
    network = Logits(training_model)
    layout = ms.Tensor(POSITIONS * 0 + 1), ms.Tensor(POSITIONS * 0), ms.Tensor(POSITIONS)
    earlier, last = move_last(lambda ids: network(ms.Tensor(ids), *layout).asnumpy(), SEQ_LEN)
    assert earlier == 0
    assert last > 0.1


def test_training_model_sees_no_other_group_and_no_other_answer(training_model):
    """Two groups of 100 positions of prompt and two answers of 46 positions each."""
    network = Logits(training_model)
    ids = np.random.default_rng(1).integers(0, 330, (1, SEQ_LEN)).astype(np.int32)
    groups = np.repeat([1, 2], SEQ_LEN // 2).astype(np.int32).reshape(1, -1)
    answers = np.repeat([0, 1, 2, 0, 3, 4], [100, 46, 46] * 2).astype(np.int32).reshape(1, -1)
    layout = [ms.Tensor(values) for values in (groups, answers, POSITIONS)]

    def change(begin, end):
        """Which of the six pieces of the logits change with the tokens of a piece."""
        before = network(ms.Tensor(ids), *layout).asnumpy()
        changed = ids.copy()
        changed[0, begin:end] = 5
        moved = np.abs(network(ms.Tensor(changed), *layout).asnumpy() - before)[0].max(1)
        borders = np.cumsum([0, 100, 46, 46, 100, 46, 46])
        return [bool(moved[a:b].max() > 0) for a, b in zip(borders, borders[1:])]

    assert change(0, 100) == [True, True, True, False, False, False]
    assert change(100, 146) == [False, True, False, False, False, False]
    assert change(146, 192) == [False, False, True, False, False, False]
    assert change(192, 292) == [False, False, False, True, True, True]


def test_predict_model_is_causal(predict_model):
    earlier, last = move_last(lambda ids: _logits(predict_model, ids), 64)
    assert earlier == 0
    assert last > 0.1


def _logits(model, ids):
    output = model(ms.Tensor(ids))
    return (output[0] if isinstance(output, tuple) else output).asnumpy().reshape(*ids.shape, -1)


def test_greedy_decoding_is_pytorchs(predict_model, expected):
    for pair in expected["pairs"]:
        prompt = pair["prompt_ids"]
        output = predict_model.generate(
            [prompt],
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=316,
            eos_token_id=[316, 323, 325],
        )[0]
        assert output[len(prompt) : len(prompt) + 16].tolist() == pair["greedy_16"]


@pytest.mark.parametrize("stop", [316, 323, 325])
def test_generation_ends_at_each_stop_token(predict_model, stop):
    """Raise the stop token's logit above all others: the first new token then ends the answer."""
    weight = predict_model.transformer.output_layer.weight
    kept = weight.asnumpy()
    prompt = [318, 320, 323, 10, 65, 324]
    # a row that points along the hidden state at the last prompt position wins there
    hidden = predict_model.transformer(
        input_ids=ms.Tensor(np.array([prompt + [316] * 58], np.int32))
    ).asnumpy()[0, 5]
    changed = kept.copy()
    changed[stop] = 100 * hidden / np.linalg.norm(hidden)
    try:
        weight.set_data(ms.Tensor(changed))
        output = predict_model.generate(
            [prompt],
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=316,
            eos_token_id=[316, 323, 325],
        )[0]
    finally:
        weight.set_data(ms.Tensor(kept))
    assert output[len(prompt)] == stop
    assert set(output[len(prompt) + 1 :].tolist()) <= {316}  # nothing but padding


def columns(rows):
    """Columns of a batch of rows, as Tensors."""
    return [ms.Tensor(np.stack([row[name] for row in rows])) for name in COLUMNS]


def token_pairs(expected):
    return [
        TokenPair(pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"])
        for pair in expected["pairs"]
    ]


def test_loss_and_metrics_by_hand(training_model, expected):
    """Sums of a batch from PyTorch's log-probs: against references of those + 1 and - 2, log-ratios
    are -1 and +2, rewards -0.1 and 0.2, the margin -0.3, each loss softplus(0.3) = 0.854355.
    """
    from mindrlhf import metrics

    five = expected["pairs"][:5]
    references = np.array(
        [[pair["ref_chosen_logps"] + 1, pair["ref_rejected_logps"] - 2] for pair in five]
    )
    rows = mindrecord.make_rows(token_pairs(expected)[:5], references, seq_len=SEQ_LEN, pad_id=316)
    sizes = {"seq_len": SEQ_LEN, "answers": len(rows[0]["reference_logps"])}
    rows.append(mindrecord.make_row([], pad_id=316, pairs=len(rows[0]["chosen"]), **sizes))
    tokens = sum(len(pair["chosen_ids"]) for pair in five)
    weights = ms.Tensor(np.tile([[1 / 5, 1 / tokens]], (len(rows), 1)), ms.float32)
    loss, sums, faulty = training_model(tuple(columns(rows)), weights)
    assert (faulty.asnumpy() == -1).all()
    found = metrics.compute_metrics(sums.asnumpy(), sft_weight=1.0)
    nll = -sum(pair["ref_chosen_logps"] for pair in five) / tokens
    assert found["pairs"] == 5
    assert found["tokens"] == sum(
        len(p["prompt_ids"]) - 1 + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in five
    )
    assert found["rewards/accuracies"] == 0
    for name, value, tolerance in (
        ("dpo_loss", 0.854355, 1e-4),
        ("sft_loss", nll, 1e-5),
        ("rewards/margins", -0.3, 1e-4),
        ("rewards/chosen", -0.1, 1e-4),
        ("rewards/rejected", 0.2, 1e-4),
        ("logratio_size", 1.5, 1e-3),
        ("logps/chosen", np.mean([pair["ref_chosen_logps"] for pair in five]), 1e-3),
        ("logps/chosen_per_token", -nll, 1e-5),
    ):
        assert found[name] == pytest.approx(value, abs=tolerance), name
    assert float(loss) == pytest.approx(found["loss"], abs=1e-5)  # the YAML's sft_weight is 1
    assert found["loss"] == pytest.approx(0.854355 + nll, abs=2e-4)


# each correction, and what happens without it


@pytest.fixture
def small():
    """A function that builds a one-layer network of MindFormers, without our corrections."""
    from mindformers import ChatGLM2Config, ChatGLM2ForConditionalGeneration

    config = json.loads((GOLDEN / "hf_chatglm/config.json").read_text())

    def build():
        ms.set_seed(1)
        network = ChatGLM2ForConditionalGeneration(
            ChatGLM2Config(
                num_layers=1,
                padded_vocab_size=330,
                hidden_size=96,
                ffn_hidden_size=160,
                kv_channels=16,
                num_attention_heads=6,
                multi_query_group_num=2,
                seq_length=16,
                layernorm_epsilon=config["layernorm_epsilon"],
                compute_dtype="float32",
                param_init_type="float32",
                rotary_dtype="float32",
                use_past=False,
                use_flash_attention=False,
                eos_token_id=[316],
                pad_token_id=316,
            )
        )
        for parameter in network.get_parameters():  # large enough that attention has preferences
            parameter.set_data(
                ops.normal(parameter.shape, 0.0, 0.3, seed=2)
                if len(parameter.shape) > 1
                else parameter
            )
        patches.fix_cpu(network)
        return network.set_train(False)

    operators.install()
    return build


def test_with_all_corrections_a_network_runs(small):
    earlier, last = move_last(lambda ids: _logits(small(), ids), 16)
    assert earlier == 0
    assert last > 0


def test_without_its_stand_in_rmsnorm_has_no_kernel(small, monkeypatch):
    monkeypatch.setattr(ms.ops.operations, "RmsNorm", ms.ops.auto_generate.RmsNorm)
    with pytest.raises(Exception, match="RmsNorm"):
        _logits(small(), np.ones((1, 16), np.int32))


def test_without_the_cast_correction_the_encoder_lacks_one(small):
    network = small()
    del network.transformer.encoder.cast
    with pytest.raises(Exception, match="cast"):
        _logits(network, np.ones((1, 16), np.int32))


def test_without_the_mask_correction_the_future_leaks(small):
    network = small()
    network.transformer.encoder.layers[
        0
    ].self_attention.core_attention.mul_mask = ops.Mul()  # as MindFormers has it
    earlier, _ = move_last(lambda ids: _logits(network, ids), 16)
    assert earlier > 0.1


def test_without_its_stand_in_argmax_has_no_kernel(small):
    network = small()
    assert len(network.generate([[318, 320, 5]], max_new_tokens=2, do_sample=False)[0]) >= 4
    network.argmax = ms.ops.function.math_func.argmax_ext
    with pytest.raises(Exception, match="ArgMax"):
        network.generate([[318, 320, 5]], max_new_tokens=2, do_sample=False)


def test_the_mask_is_a_float_for_plain_attention(training_model):
    assert (
        training_model.mask_dtype == ms.float32
    )  # that of flash attention, uint8, is held by its stand-in
