"""How the next token is chosen from logits: greedy decoding, or sampling."""
from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.parallel import Settings

LONGEST = 512  # tokens of an answer, unless the YAML limits it
CANDIDATES = 1024  # top_p first looks among so many tokens; they nearly always suffice


class Sampling(NamedTuple):
    """How an answer is generated.

    Attributes:
        max_new_tokens: longest answer.
        temperature: divides the logits; 0 is greedy decoding.
        top_p: sample from the fewest tokens whose probabilities add up to this; 1: from all.
        top_k: sample from this many of the likeliest tokens; 0: from all.
        repetition_penalty: divides the positive logits of tokens that prompt or answer have, and
            multiplies their negative ones (arXiv:1909.05858); 1: none.
        seed: of the random numbers.
    """
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, so that the seed has no effect."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def is_argmax(self) -> bool:
        """Whether the largest of the model's own logits is taken."""
        return self.is_greedy and self.repetition_penalty == 1


def sampling_of(settings: Settings, given: Mapping[str, Any]) -> Sampling:
    """The YAML's settings, with those given on the command line.

    Args:
        settings: as config.load_settings returns them.
        given: field of Sampling -> value, or None for the YAML's. A temperature, top_p or top_k
            turns sampling on; temperature 0 turns it off.
    """
    model = settings["model"]["model_config"]
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    values = {name: model[name] for name in names if name in model}
    values.setdefault("temperature", 1.0)
    samples = any(given.get(name) is not None for name in names[:3])
    if not (model.get("do_sample") or samples):
        values["temperature"] = 0.0
    if samples and values.get("top_k") == 1:
        del values["top_k"]  # it spells greedy decoding in MindFormers' YAMLs
    limits = [model.get(name) for name in ("max_decode_length", "max_new_tokens")]
    values.update(max_new_tokens=min((limit for limit in limits if limit), default=LONGEST),
                  seed=settings["seed"])
    return Sampling(**{**values, **{name: value for name, value in given.items()
                                    if value is not None}})


def generator_of(sampling: Sampling, prompt: Sequence[int], number: int) -> np.random.Generator:
    """Random numbers of one answer. They depend on no other answer of its batch.

    Args:
        sampling: how it is generated.
        prompt: its prompt's token ids.
        number: of the answer, among those to its prompt.
    """
    text = np.asarray(prompt, np.int32).tobytes()
    return np.random.default_rng([sampling.seed, number, zlib.crc32(text)])


def choose_token(logits: np.ndarray, sampling: Sampling, seen: Sequence[int],
                 random: np.random.Generator) -> int:
    """The next token of an answer.

    Args:
        logits: float32 (V,).
        sampling: how it is chosen.
        seen: token ids of prompt and answer so far.
        random: of the answer.
    """
    if sampling.repetition_penalty != 1:
        ids = np.unique(seen)
        logits = logits.copy()
        logits[ids] *= np.where(logits[ids] < 0, sampling.repetition_penalty,
                                1 / sampling.repetition_penalty)
    if sampling.is_greedy:
        return int(logits.argmax())
    scores = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    ids = np.arange(scores.size)
    if 0 < sampling.top_k < scores.size:
        ids = _largest(scores, sampling.top_k)
    weights = np.exp(scores[ids])
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    sums = weights.cumsum()
    place = np.searchsorted(sums, random.random() * sums[-1], side="right")
    return int(ids[min(place, ids.size - 1)])


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest values in descending order; of equal ones, the first come first."""
    if count < values.size:
        least = np.partition(values, values.size - count)[values.size - count]
        places = np.flatnonzero(values >= least)
    else:
        places = np.arange(values.size)
    return places[np.argsort(-values[places], kind="stable")][:count]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Places of the fewest weights that make up top_p of their sum, and of at least one."""
    wanted = top_p * weights.sum()
    for count in (min(CANDIDATES, weights.size), weights.size):
        places = _largest(weights, count)
        sums = weights[places].cumsum()
        if sums[-1] >= wanted:
            break
    return places[:int(np.searchsorted(sums, wanted)) + 1]
