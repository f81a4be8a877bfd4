"""One engine, many answers: the same tokens however they are batched, cached or streamed."""

import random

import hypothesis
import numpy as np
import pytest
from conftest import GOLDEN, load_model

from mindrlhf import config
from mindrlhf.cli import UserError
from mindrlhf.inference import sampling as sampling_module
from mindrlhf.inference.blocks import BlockPool
from mindrlhf.inference.engine import Answer, Engine, room_of
from mindrlhf.inference.options import require_sampling
from mindrlhf.inference.sampling import Sampling, choose_token, sampling_of
from mindrlhf.inference.text_stream import TextStream
from mindrlhf.models.glm4 import template
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

KEY = "model.model_config."
CACHED = {
    f"{KEY}use_past": True,
    f"{KEY}is_dynamic": True,
    f"{KEY}use_flash_attention": True,
    f"{KEY}block_size": 16,
    f"{KEY}num_blocks": 12,
    f"{KEY}seq_length": 64,
}
FORMS = {
    "cached": CACHED,
    "static": {**CACHED, f"{KEY}is_dynamic": False, f"{KEY}num_blocks": 64},
    "plain": {f"{KEY}seq_length": 64},
}
GREEDY = Sampling(16)
SAMPLED = Sampling(16, temperature=1.0, top_p=0.9, top_k=50, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return Glm4Tokenizer(GOLDEN / "tokenizer.model")


def make_engine(golden, tokenizer, form, batch_size):
    settings = config.load_settings(golden.predict, run_mode="predict", overrides=FORMS[form])
    return Engine(load_model(golden, "predict", FORMS[form]), tokenizer, settings, batch_size)


@pytest.fixture(scope="module")
def engine(golden, tokenizer):
    """As on an NPU: flash attention, a paged cache of 12 blocks, dynamic shapes."""
    return make_engine(golden, tokenizer, "cached", 4)


def tokens_of(engine, answers):
    """Tokens of answers that are generated together, in the order given."""
    answers = list(answers)
    assert {id(answer) for answer in engine.run(answers)} == {id(answer) for answer in answers}
    return [answer.tokens for answer in answers]


def golden_answers(expected, sampling=GREEDY):
    return [Answer(pair["prompt_ids"], sampling) for pair in expected["pairs"]]


@pytest.mark.parametrize("form", ["static", "plain"])
def test_batched_greedy_answers_are_pytorchs(golden, tokenizer, expected, form):
    """Eight answers through three places: the batch is 3, 2 and 1 rows large on the way."""
    found = tokens_of(make_engine(golden, tokenizer, form, 3), golden_answers(expected))
    assert found == [pair["greedy_16"] for pair in expected["pairs"]]


def test_cached_greedy_answers_are_pytorchs_in_any_order_and_batch(engine, expected):
    wanted = [pair["greedy_16"] for pair in expected["pairs"]]
    for batch_size in (1, 4, 3):
        engine.batch_size = batch_size
        order = random.Random(batch_size).sample(range(8), 8)
        answers = golden_answers(expected)
        tokens_of(engine, [answers[place] for place in order])
        assert [answer.tokens for answer in answers] == wanted
    engine.batch_size = 4


def test_answers_of_different_lengths_and_settings_share_a_batch(engine, expected):
    pairs = expected["pairs"]
    answers = [
        Answer(pairs[0]["prompt_ids"], GREEDY._replace(max_new_tokens=3)),
        Answer(pairs[1]["prompt_ids"], SAMPLED),
        Answer(pairs[2]["prompt_ids"], GREEDY),
        Answer(pairs[6]["prompt_ids"], GREEDY._replace(max_new_tokens=1000)),
    ]
    tokens_of(engine, answers)
    assert answers[0].tokens == pairs[0]["greedy_16"][:3]
    assert answers[2].tokens == pairs[2]["greedy_16"]
    assert answers[3].tokens[:16] == pairs[6]["greedy_16"]
    assert answers[3].length <= 64
    assert [answer.finish_reason for answer in answers[:3]] == ["length"] * 3


def test_streamed_pieces_are_the_answer(engine, tokenizer, expected):
    for pair in expected["pairs"][:4]:
        answer = Answer(pair["prompt_ids"], GREEDY)
        pieces = list(engine.stream(answer))
        assert answer.tokens == pair["greedy_16"]
        assert "".join(pieces) == tokenizer.decode(pair["greedy_16"]).strip() == answer.text
        assert sum(map(bool, pieces)) > 1


def test_sampling_repeats_with_its_seed_alone_and_in_a_batch(engine, expected):
    alone = [tokens_of(engine, [answer])[0] for answer in golden_answers(expected, SAMPLED)]
    assert tokens_of(engine, golden_answers(expected, SAMPLED)) == alone
    assert alone != [pair["greedy_16"] for pair in expected["pairs"]]
    other = SAMPLED._replace(seed=4)
    assert tokens_of(engine, golden_answers(expected, other)) != alone
    prompt = expected["pairs"][0]["prompt_ids"]
    several = tokens_of(engine, [Answer(prompt, SAMPLED, number) for number in range(3)])
    assert several[0] == alone[0]
    assert len(set(map(tuple, several))) == 3


def test_an_answer_that_is_left_ends_and_frees_its_place(engine, expected):
    prompt, blocks = expected["pairs"][0]["prompt_ids"], len(engine.pool.free)
    answer = Answer(prompt, GREEDY)
    pieces = engine.stream(answer)
    next(pieces), next(pieces)
    pieces.close()
    assert answer.finish_reason == "cancelled"
    assert len(answer.tokens) == 2
    assert not engine.running
    assert len(engine.pool.free) == blocks
    waiting = engine.submit(Answer(prompt, GREEDY))
    engine.cancel(waiting)
    assert engine.step() == []


def test_a_cache_too_small_for_the_batch_makes_answers_wait(engine, expected):
    """12 blocks of 16: each answer may get 64 tokens, 4 blocks, so three run at once."""
    answers = golden_answers(expected, GREEDY._replace(max_new_tokens=60))
    for answer in answers:
        engine.submit(answer)
    most = 0
    while engine.running or engine.waiting:
        engine.step()
        most = max(most, len(engine.running))
    assert most == 3
    assert [answer.tokens[:16] for answer in answers] == [
        pair["greedy_16"] for pair in expected["pairs"]
    ]
    assert sorted(engine.pool.free) == list(range(12))


def test_a_prompt_without_room_is_refused_with_its_length(engine):
    with pytest.raises(UserError, match="is 64 tokens .* fills seq_length 64; shorten it"):
        engine.submit(Answer([5] * 64, GREEDY))
    answer = Answer([5] * 63, GREEDY)
    assert [len(tokens) for tokens in tokens_of(engine, [answer])] == [1]


def test_the_room_is_that_of_the_cache():
    sizes = {"seq_length": 100, "use_past": True, "block_size": 16, "num_blocks": 512}
    assert room_of({"model": {"model_config": sizes}}) == 96
    assert room_of({"model": {"model_config": {**sizes, "num_blocks": 2}}}) == 32
    assert room_of({"model": {"model_config": {**sizes, "use_past": False}}}) == 100


def test_a_stop_string_ends_an_answer(engine, tokenizer, expected):
    pair = expected["pairs"][0]
    text = tokenizer.decode(pair["greedy_16"]).strip()
    stop = text[4:6]
    answer = Answer(pair["prompt_ids"], GREEDY, stop=(stop, "never"))
    pieces = list(engine.stream(answer))
    assert "".join(pieces) == answer.text == text[: text.index(stop)].rstrip()
    assert answer.finish_reason == "stop"
    assert len(answer.tokens) < 16


def test_special_tokens_in_a_conversation_stay_text(tokenizer):
    tags = "<|user|><|endoftext|>[gMASK]<sop>"
    plain = template.prompt_ids(
        tokenizer, [("system", "x"), ("user", "x"), ("assistant", "x"), ("user", "x")]
    )
    ids = template.prompt_ids(
        tokenizer, [("system", tags), ("user", tags), ("assistant", tags), ("user", tags)]
    )
    special = set(tokenizer.special.values())
    assert [token for token in ids if token in special] == [
        token for token in plain if token in special
    ]
    assert tokenizer.decode(ids).count(tags) == 4


# choosing a token


def draws(sampling, logits, count=2000, seen=()):
    generator = np.random.default_rng(0)
    found = [choose_token(logits, sampling, seen, generator) for _ in range(count)]
    return np.bincount(found, minlength=len(logits)) / count


LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))


def test_sampling_follows_the_probabilities():
    np.testing.assert_allclose(draws(Sampling(1, 1.0), LOGITS), np.exp(LOGITS), atol=0.04)
    hot = np.exp(LOGITS / 2) / np.exp(LOGITS / 2).sum()
    np.testing.assert_allclose(draws(Sampling(1, 2.0), LOGITS), hot, atol=0.04)


def test_top_k_and_top_p_cut_the_tail():
    np.testing.assert_allclose(
        draws(Sampling(1, 1.0, top_k=2), LOGITS), [2 / 3, 1 / 3, 0, 0], atol=0.04
    )
    np.testing.assert_allclose(
        draws(Sampling(1, 1.0, top_p=0.7), LOGITS), [2 / 3, 1 / 3, 0, 0], atol=0.04
    )
    assert draws(Sampling(1, 1.0, top_p=1e-6), LOGITS)[0] == 1
    assert draws(Sampling(1, 1.0, top_k=1), LOGITS)[0] == 1
    assert draws(Sampling(1, 1e-300), LOGITS)[0] == 1
    assert draws(Sampling(1), LOGITS)[0] == 1


def test_top_p_looks_further_than_its_candidates(monkeypatch):
    monkeypatch.setattr(sampling_module, "CANDIDATES", 1)
    found = draws(Sampling(1, 1.0, top_p=0.7), LOGITS)
    np.testing.assert_allclose(found, [2 / 3, 1 / 3, 0, 0], atol=0.04)


def test_the_repetition_penalty_is_that_of_its_paper():
    logits = np.array([2.0, 1.5, -1.0, -1.2], np.float32)
    greedy = Sampling(1, repetition_penalty=2.0)
    generator = np.random.default_rng(0)
    assert choose_token(logits, greedy, [0, 0], generator) == 1  # 2 / 2 < 1.5, once and not twice
    assert choose_token(logits[2:], greedy, [0], generator) == 1  # -1 * 2 < -1.2
    assert logits[0] == 2.0  # the model's logits stay


def test_the_yaml_gives_what_the_command_line_does_not():
    model = {"max_decode_length": 9, "do_sample": True, "temperature": 0.5, "top_k": 7}
    settings = {"seed": 5, "model": {"model_config": model}}
    assert sampling_of(settings, {}) == Sampling(9, 0.5, top_k=7, seed=5)
    assert sampling_of(settings, {"temperature": 0.0, "seed": None}).is_greedy
    model["do_sample"] = False
    assert sampling_of(settings, {}).is_argmax
    assert sampling_of(settings, {"top_p": 0.5}) == Sampling(9, 0.5, 0.5, 7, seed=5)
    assert sampling_of(settings, {"max_new_tokens": 3}) == Sampling(3, 0.0, top_k=7, seed=5)


def test_a_temperature_samples_from_more_than_one_token():
    """MindFormers' predict_glm4_9b_chat.yaml has top_k 1, which would be greedy all the same."""
    model = {"top_k": 1, "top_p": 1, "do_sample": False}
    settings = {"model": {"model_config": model}, "seed": 5}
    assert sampling_of(settings, {}).is_greedy
    assert not sampling_of(settings, {"temperature": 1.0}).is_greedy
    assert sampling_of(settings, {"temperature": 1.0, "top_k": 1}).is_greedy
    with pytest.raises(UserError, match="add --top_k 0"):
        require_sampling(sampling_of(settings, {"temperature": 1.0, "top_k": 1}), 2)


# text and blocks


def stream_of(tokenizer, text, stop=()):
    """Pieces of a text that is put in byte by byte."""
    stream = TextStream(tokenizer, stop)
    ids = [token for byte in text.encode() for token in range(256)
           if tokenizer.bytes_of(token) == bytes([byte])]  # fmt: skip
    pieces = []
    for token in ids:
        stream.put(token)
        pieces.append(stream.read())
        if stream.is_stopped:
            break
    stream.end()
    return [*pieces, stream.read()], stream


def test_characters_come_complete(tokenizer):
    pieces, stream = stream_of(tokenizer, "\n 跑步 a 🙂\n")
    assert "".join(pieces) == stream.text == "跑步 a 🙂"
    assert not any("\ufffd" in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == ["跑", "步", " a", " 🙂"]


def test_an_incomplete_character_at_the_end_is_one_replacement(tokenizer):
    byte = next(token for token in range(256) if tokenizer.bytes_of(token) == b"\xe8")
    stream = TextStream(tokenizer)
    stream.put(byte)
    assert stream.read() == ""
    stream.put(tokenizer.pad_id)
    stream.end()
    assert stream.read() == tokenizer.decode([byte, tokenizer.pad_id]) == "\ufffd"


def test_what_may_be_a_stop_string_is_held_back(tokenizer):
    pieces, stream = stream_of(tokenizer, "aab stop", ["aabb", "stop"])
    assert "".join(pieces) == "aab"
    assert stream.is_stopped
    assert stream_of(tokenizer, "aabc", ["aabb"])[0] == ["", "", "", "aabc", ""]
    assert "".join(stream_of(tokenizer, "aab", ["aabb"])[0]) == "aab"


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    hypothesis.strategies.text("a b\n跑\u0301", max_size=12),
    hypothesis.strategies.lists(hypothesis.strategies.text("a b跑", max_size=3), max_size=2),
)
def test_pieces_of_any_text_are_its_answer(tokenizer, text, stop):
    pieces, stream = stream_of(tokenizer, text, stop)
    assert "".join(pieces) == stream.text
    stops = [item for item in stop if item]
    assert stream.is_stopped == any(item in text.lstrip() for item in stops)
    assert not any(item in stream.text for item in stops)
    if not stream.is_stopped:
        assert stream.text == text.strip()


def test_blocks_by_hand():
    pool = BlockPool(4, 5, 12)
    first, second = pool.take(5), pool.take(9)
    assert (first, second, pool.take(1)) == ([0, 1], [2, 3, 4], None)
    assert pool.tables([first, second]).tolist() == [[0, 1, -1], [2, 3, 4]]
    pool.give_back(first)
    assert pool.take(8) == [0, 1]
    assert pool.slots([3, 1], 0, 6, 8).tolist() == [12, 13, 14, 15, 4, 5, -1, -1]
    assert pool.slots([3, 1], 5, 6, 1).tolist() == [5]
