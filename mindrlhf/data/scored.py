"""Scored pairs: their tokens and the log-probs of their answers, in one part or in all of them."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from mindrlhf.data.groups import Sequences, Sizes


@dataclass(frozen=True)
class Part:
    """Some pairs of the source, tokenized and scored. The fields are the arrays of its file.

    Attributes:
        numbers: int32 (N,), of the scored pairs among the source's pairs.
        prompts, answers, pairs: see groups.Sizes.
        tokens: int32, all prompts, then all answers, concatenated.
        prompt_hashes, answer_hashes: uint64 (Q, 2) and (M, 2), of their token ids.
        logps: float32 (M,), reference log-prob of each answer, nats.
        cut: int32 (N,), tokens cut from the prompt of each pair.
        dropped: int32, numbers of the pairs that do not fit into a row.
    """
    numbers: np.ndarray
    prompts: np.ndarray
    answers: np.ndarray
    pairs: np.ndarray
    tokens: np.ndarray
    prompt_hashes: np.ndarray
    answer_hashes: np.ndarray
    logps: np.ndarray
    cut: np.ndarray
    dropped: np.ndarray

    @classmethod
    def of(cls, found: Sequences, logps: np.ndarray, *, numbers: Sequence[int],
           cut: Sequence[int], dropped: Sequence[int]) -> Part:
        """Make a part of the sequences of its pairs.

        Args:
            found: prompts, answers and pairs.
            logps: float32 (M,), of each answer.
            numbers, cut, dropped: see the attributes.
        """
        texts = [np.array(ids, np.int32) for ids in (*found.prompts, *found.answers)]
        hashes = np.frombuffer(b"".join(xxhash.xxh3_128_digest(ids.tobytes()) for ids in texts),
                               np.uint64).reshape(-1, 2)
        prompts = len(found.prompts)
        return cls(np.array(numbers, np.int32), *found.sizes,
                   tokens=np.concatenate([np.zeros(0, np.int32), *texts]),
                   prompt_hashes=hashes[:prompts], answer_hashes=hashes[prompts:],
                   logps=logps, cut=np.array(cut, np.int32),
                   dropped=np.array(dropped, np.int32))


@dataclass(frozen=True)
class Scored:
    """All N scored pairs, in the order of the source. Tokens stay on disk until read.

    Attributes:
        numbers: int32 (N,), of the pairs among the source's pairs.
        sizes: their distinct prompts and answers.
        logps: float32 (M,), reference log-prob of each answer, nats.
        cut: int32 (N,), tokens cut from the prompt of each pair.
        dropped: int32, numbers of the pairs that do not fit into a row.
        files: open part files.
        prompt_places, answer_places: int64 (Q, 2) and (M, 2), file and first token of each.
        first_equal: int64 (Q,), the first prompt with the same tokens.
    """
    numbers: np.ndarray
    sizes: Sizes
    logps: np.ndarray
    cut: np.ndarray
    dropped: np.ndarray
    files: list[Any]
    prompt_places: np.ndarray
    answer_places: np.ndarray
    first_equal: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[Mapping[str, np.ndarray]], files: list[Any],
           share: bool) -> Scored:
        """Join parts.

        Args:
            parts: the arrays of each, without its tokens.
            files: the same parts, open.
            share: whether prompts that are equal in different parts become one.
        """
        joined = _join(parts)
        prompt_places, answer_places = (np.concatenate(kind) for kind in zip(
            *(_places(number, part) for number, part in enumerate(parts))))
        first_equal = _first_equal(joined["prompt_hashes"])
        if share:
            _merge_equal(joined, first_equal)
        order = np.argsort(joined["numbers"], kind="stable")  # parts hold bundles, not runs
        return cls(
            joined["numbers"][order],
            Sizes(joined["prompts"], joined["answers"], joined["pairs"][order]), joined["logps"],
            joined["cut"][order], np.sort(joined["dropped"]), files,
            prompt_places, answer_places, first_equal)

    @property
    def first_of_prompt(self) -> np.ndarray:
        """int (N,): the first pair whose prompt has the same tokens."""
        prompts = self.sizes.answers[self.sizes.pairs[:, 0], 0]
        return _first_equal(self.first_equal[prompts].reshape(-1, 1))

    @property
    def sides(self) -> np.ndarray:
        """int32 (N, 2): tokens of prompt + chosen and of prompt + rejected answer."""
        prompts, tokens = np.moveaxis(self.sizes.answers[self.sizes.pairs], 2, 0)
        return self.sizes.prompts[prompts] + tokens

    @property
    def per_token(self) -> np.ndarray:
        """float32 (N, 2): nats per token of the chosen and the rejected answer."""
        return (self.logps / self.sizes.answers[:, 1])[self.sizes.pairs]

    def prompt(self, number: int) -> list[int]:
        """Read the token ids of a prompt."""
        return self._read(self.prompt_places[number], self.sizes.prompts[number])

    def answer(self, number: int) -> list[int]:
        """Read the token ids of an answer."""
        return self._read(self.answer_places[number], self.sizes.answers[number, 1])

    def _read(self, place: np.ndarray, count: int) -> list[int]:
        file, begin = place.tolist()
        return self.files[file].get_slice("tokens")[begin:begin + int(count)].tolist()


def _join(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate the arrays of all parts; prompts and answers are renumbered."""
    prompts = np.cumsum([0, *(len(part["prompts"]) for part in parts)])
    answers = np.cumsum([0, *(len(part["answers"]) for part in parts)])
    renumbered = [{**part, "answers": part["answers"] + [[prompt, 0]],
                   "pairs": part["pairs"] + answer}
                  for part, prompt, answer in zip(parts, prompts, answers)]
    return {name: np.concatenate([part[name] for part in renumbered]) for name in parts[0]}


def _places(number: int, part: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """File and first token of each prompt and each answer of a part: int64 (Q, 2), (M, 2)."""
    counts = np.concatenate([part["prompts"], part["answers"][:, 1]]).astype(np.int64)
    places = np.stack([np.full(len(counts), number), np.cumsum(counts) - counts], 1)
    return places[:len(part["prompts"])], places[len(part["prompts"]):]


def _merge_equal(joined: dict[str, np.ndarray], first_equal: np.ndarray) -> None:
    """Let answers and pairs refer to the first of equal prompts and of equal answers, in place."""
    answers = joined["answers"]
    answers[:, 0] = first_equal[answers[:, 0]]
    keys = np.concatenate([answers[:, :1].astype(np.uint64), joined["answer_hashes"]], 1)
    joined["pairs"] = _first_equal(keys)[joined["pairs"]]


def _first_equal(keys: np.ndarray) -> np.ndarray:
    """Index of the first row that equals each row: (N, K) -> int (N,)."""
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]
