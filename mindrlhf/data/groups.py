"""Sharing: finds equal prompts and equal answers, and forms the groups that rows are made of."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.data.features import ComparedPair, TokenGroup, TokenPair, group_size
from mindrlhf.data.preference import Pair

# positions of a row for each answer and each pair that it takes at most: the sizes of tensors. Ten
# ranked answers, which take 160 positions, make 45 pairs
FOR_AN_ANSWER, FOR_A_PAIR = 16, 4


class Limits(NamedTuple):
    """How much a row, or a group, may hold at most: positions, answers and pairs."""
    positions: int
    answers: int
    pairs: int


class Sizes(NamedTuple):
    """Distinct prompts and answers of some pairs, without their tokens.

    Attributes:
        prompts: int32 (Q,), tokens of each prompt.
        answers: int32 (M, 2), each answer's prompt and number of tokens.
        pairs: int32 (N, 2), each pair's chosen and rejected answer.
    """
    prompts: np.ndarray
    answers: np.ndarray
    pairs: np.ndarray

    def unshared(self, members: np.ndarray) -> int:
        """Positions of some pairs if each of their sequences stood alone, its prompt included.

        members: int (N,), indices into pairs.
        """
        prompts, tokens = self.answers[self.pairs[members]].reshape(-1, 2).T
        return int(group_size(self.prompts[prompts], tokens).sum(dtype=np.int64))


@dataclass
class PairGroup:
    """A prompt, some of its answers, and the pairs that compare them, all by index.

    Attributes:
        prompt: into Sizes.prompts.
        answers: into Sizes.answers.
        pairs: into Sizes.pairs.
        tokens: of the answers together.
    """
    prompt: int
    answers: list[int]
    pairs: list[int]
    tokens: int = 0

    def compare(self, pairs: Any, numbers: Any) -> list[ComparedPair]:
        """The pairs, with their answers counted within the group.

        Args:
            pairs: pair -> its chosen and its rejected answer; a sequence or a dict.
            numbers: pair -> its row in the source.
        """
        place = {answer: number for number, answer in enumerate(self.answers)}
        return [ComparedPair(place[chosen], place[rejected], numbers[pair])
                for pair in self.pairs for chosen, rejected in [pairs[pair]]]


@dataclass(frozen=True)
class Sequences:
    """Distinct prompts and answers of some pairs, as token ids.

    Attributes:
        prompts: token ids of each prompt.
        answers: token ids of each answer.
        prompt_of: index of each answer's prompt.
        pairs: indices of each pair's chosen and rejected answer.
    """
    prompts: list[list[int]]
    answers: list[list[int]]
    prompt_of: list[int]
    pairs: list[tuple[int, int]]

    @property
    def sizes(self) -> Sizes:
        """The numbers of tokens."""
        answers = [(prompt, len(ids)) for prompt, ids in zip(self.prompt_of, self.answers)]
        return Sizes(np.array([len(ids) for ids in self.prompts], np.int32),
                     np.array(answers, np.int32).reshape(-1, 2),
                     np.array(self.pairs, np.int32).reshape(-1, 2))

    def read(self, group: PairGroup, logps: np.ndarray | None = None) -> TokenGroup:
        """The token ids of a group; a pair's number is its index.

        Args:
            group: of these sequences.
            logps: float32 (M,), reference log-prob of each answer, nats.
        """
        return TokenGroup(self.prompts[group.prompt], [self.answers[k] for k in group.answers],
                          group.compare(self.pairs, range(len(self.pairs))),
                          [] if logps is None else logps[group.answers].tolist())


def row_limits(seq_len: int) -> Limits:
    """What a row of seq_len positions may hold."""
    return Limits(seq_len, *(max(2, seq_len // each) for each in (FOR_AN_ANSWER, FOR_A_PAIR)))


def bundle_pairs(pairs: Sequence[Pair], share: bool) -> list[list[int]]:
    """Bundle the pairs with the same conversation, so that one worker gets all of them.

    Args:
        pairs: of the source.
        share: False makes each pair a bundle of its own.

    Returns:
        Indices of each bundle's pairs, in the order of their first pairs.
    """
    if not share:
        return [[number] for number in range(len(pairs))]
    bundles: dict[object, list[int]] = {}
    for number, pair in enumerate(pairs):
        bundles.setdefault(pair.messages, []).append(number)
    return list(bundles.values())


def estimate_tokens(pairs: Sequence[Pair], bundle: Sequence[int]) -> int:
    """Tokens of a bundle before it is tokenized: roughly one for every 4 bytes of UTF-8.

    Args:
        pairs: of the source.
        bundle: indices of pairs with the same conversation.
    """
    texts = {text for number in bundle for text in (pairs[number].chosen, pairs[number].rejected)}
    texts |= {text for _, text in pairs[bundle[0]].messages}
    return sum(len(text.encode()) for text in texts) // 4


def find_sequences(pairs: Iterable[TokenPair], share: bool) -> Sequences:
    """Find the distinct prompts and answers of some pairs.

    Args:
        pairs: the pairs.
        share: False takes the prompt of each pair as a prompt of its own.
    """
    prompts: dict[tuple[int, ...], int] = {}
    answers: dict[tuple[int, ...], int] = {}
    found = Sequences([], [], [], [])

    def index(ids: list[int], key: tuple[int, ...], known: dict[tuple[int, ...], int],
              texts: list[list[int]]) -> int:
        if key not in known:
            known[key] = len(texts)
            texts.append(ids)
        return known[key]

    for number, pair in enumerate(pairs):
        key = tuple(pair.prompt) if share else (number,)
        prompt = index(pair.prompt, key, prompts, found.prompts)
        chosen, rejected = (index(ids, (prompt, *ids), answers, found.answers)
                            for ids in (pair.chosen, pair.rejected))
        found.prompt_of.extend([prompt] * (len(found.answers) - len(found.prompt_of)))
        found.pairs.append((chosen, rejected))
    return found


def make_groups(sizes: Sizes, members: Iterable[int], limits: Limits) -> list[PairGroup]:
    """Group pairs by prompt. A group that exceeds the limits is split; no pair is.

    Args:
        sizes: of prompts, answers and pairs.
        members: the pairs to group, into sizes.pairs.
        limits: of a row. Each pair alone is within them.

    Returns:
        The groups, in the order of their first pairs.
    """
    answers, pairs = sizes.answers.tolist(), sizes.pairs.tolist()
    groups: list[PairGroup] = []
    open_groups: dict[int, PairGroup] = {}
    for pair in members:
        prompt = answers[pairs[pair][0]][0]
        group = open_groups.get(prompt)
        if group is not None:
            new = [answer for answer in dict.fromkeys(pairs[pair]) if answer not in group.answers]
            tokens = group.tokens + sum(answers[answer][1] for answer in new)
            size = Limits(group_size(int(sizes.prompts[prompt]), tokens),
                          len(group.answers) + len(new), len(group.pairs) + 1)
            if any(have > most for have, most in zip(size, limits)):
                group = None
        if group is None:
            group = open_groups[prompt] = PairGroup(prompt, [], [])
            groups.append(group)
            new = list(dict.fromkeys(pairs[pair]))
        group.answers += new
        group.tokens += sum(answers[answer][1] for answer in new)
        group.pairs.append(pair)
    return groups


def group_sizes(sizes: Sizes, groups: Sequence[PairGroup]) -> np.ndarray:
    """Positions, answers and pairs of each group: int64 (G, 3), in the order of Limits."""
    return np.array([(group_size(int(sizes.prompts[group.prompt]), group.tokens),
                      len(group.answers), len(group.pairs)) for group in groups],
                    np.int64).reshape(-1, 3)
