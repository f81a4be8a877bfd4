"""Log-probs of pairs to rewards, metrics and a Score."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindrlhf.cli import UserError
from mindrlhf.data.groups import group_sizes, make_groups, row_limits
from mindrlhf.data.scored import Scored
from mindrlhf.inference import estimates, multiple_choice
from mindrlhf.inference.score_data import ChoiceData, ScoreData
from mindrlhf.inference.score_record import Score
from mindrlhf.metrics import compute_metrics
from mindrlhf.records import SIDES, SUMS

SETTINGS = ("beta", "loss_type", "label_smoothing", "sft_weight", "average_log_prob")


@dataclass(frozen=True)
class PairValues:
    """What a model gives for N pairs. The second axis is chosen, rejected.

    Attributes:
        logps: float32 (N, 2), log-prob of each answer, nats.
        references: float32 (N, 2), the same under the reference; None for multiple choice.
        tokens: int32 (N, 2), of each answer.
        prompts: int32 (N,), number of each pair's prompt.
        rewards: float32 (N, 2), beta x log-ratio; log-probs where there is no reference.
    """
    logps: np.ndarray
    references: np.ndarray | None
    tokens: np.ndarray
    prompts: np.ndarray
    rewards: np.ndarray

    @classmethod
    def of(cls, scored: Scored, logps: np.ndarray, references: np.ndarray | None,
           dpo: Mapping[str, Any]) -> PairValues:
        """The values of scored pairs, computed as Glm4DPO does.

        Args:
            scored: the pairs.
            logps, references: as in the attributes.
            dpo: section of the YAML.
        """
        answers = scored.sizes.answers[scored.sizes.pairs]
        tokens, prompts = answers[:, :, 1], _in_order_of_appearance(answers[:, 0, 0])
        if references is None:
            return cls(logps, None, tokens, prompts, logps)
        terms = logps - references
        if dpo["average_log_prob"] or dpo["loss_type"] == "ipo":
            terms = terms / np.maximum(tokens, 1).astype(np.float32)
        return cls(logps, references, tokens, prompts, np.float32(dpo["beta"]) * terms)

    @property
    def margins(self) -> np.ndarray:
        """float32 (N,): chosen reward - rejected reward."""
        return self.rewards[:, 0] - self.rewards[:, 1]


def _in_order_of_appearance(keys: np.ndarray) -> np.ndarray:
    """Numbers of equal keys, from 0."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse.reshape(-1)]


def trl_metrics(values: PairValues, dpo: Mapping[str, Any], tokens: int) -> dict[str, float]:
    """The metrics of an evaluation, except for the padding of its rows.

    Args:
        values: with references.
        dpo: section of the YAML.
        tokens: of all rows, shared ones once.
    """
    from mindspore import Tensor

    from mindrlhf.losses import get_loss
    assert values.references is not None
    losses = get_loss(dpo["loss_type"])(Tensor(values.margins / np.float32(dpo["beta"])),
                                        dpo["beta"], dpo["label_smoothing"]).asnumpy()
    ratios = np.abs(values.logps - values.references)
    total = {"pairs": len(losses), "positions": tokens, "tokens": tokens,
             "dpo_loss": losses.sum(dtype=np.float64),
             "correct": (values.rewards[:, 0] > values.rewards[:, 1]).sum(),
             "logratio_size": ratios.sum(dtype=np.float64)}
    for column, side in enumerate(SIDES):
        for name, each in ((f"{side}_tokens", values.tokens), (f"{side}_logps", values.logps),
                           (f"{side}_reward", values.rewards)):
            total[name] = each[:, column].sum(dtype=np.float64)
    total["sft_nll"] = -total["chosen_logps"]
    found = compute_metrics([float(total[name]) for name in SUMS], sft_weight=dpo["sft_weight"])
    del found["padding"]
    for column, side in enumerate(SIDES):
        sums = values.references[:, column].sum(dtype=np.float64)
        found[f"reference_logps/{side}"] = float(sums / len(losses))
        found[f"reference_logps/{side}_per_token"] = float(sums / total[f"{side}_tokens"])
    return found


def count_tokens(scored: Scored, seq_len: int) -> int:
    """Tokens of the rows that hold all pairs, shared ones once."""
    groups = make_groups(scored.sizes, range(len(scored.numbers)), row_limits(seq_len))
    return int(group_sizes(scored.sizes, groups)[:, 0].sum())


def preference_score(values: PairValues, scored: Scored, source: ScoreData, *, seq_len: int,
                     dpo: Mapping[str, Any], **about: Any) -> Score:
    """The score of preference pairs.

    Args:
        values: of the pairs.
        scored: the pairs.
        source: that they are from.
        seq_len: positions of a row.
        dpo: section of the YAML.
        about: the fields of Score that are not computed.
    """
    tokens = source.tokens(scored) or count_tokens(scored, seq_len)
    types = source.types(scored)
    labels = {"type": estimates.label_names(types.names, types.numbers),
              "length": estimates.label_lengths(values.tokens),
              "longer answer": estimates.label_longer(values.tokens)}
    slices = {by: estimates.slice_pairs(parts, values.margins, values.prompts)
              for by, parts in labels.items()}
    return Score(
        accuracy=estimates.accuracy_of(values.margins, values.prompts),
        margin=estimates.mean_of(values.margins, values.prompts),
        metrics=trl_metrics(values, dpo, tokens),
        settings={name: dpo[name] for name in SETTINGS} | {"seq_length": seq_len},
        slices={by: found for by, found in slices.items() if found}, **about)


def choice_score(values: PairValues, scored: Scored, source: ChoiceData, *, seq_len: int,
                 **about: Any) -> Score:
    """The score of multiple choice; arguments as in preference_score()."""
    trials = [source.quiz.trials[number] for number in scored.numbers.tolist()]
    if all(trial.form == multiple_choice.PLAIN for trial in trials):
        raise UserError(f"no multiple-choice prompt fits into {seq_len} tokens, only the plain "
                        "questions do; raise seq_length")
    metrics, slices = multiple_choice.describe_choices(trials, values.logps, values.tokens)
    asked = np.array([trial.form != multiple_choice.PLAIN for trial in trials])
    questions = np.array([trial.question for trial in trials])[asked]
    margins = values.margins[asked]
    return Score(accuracy=estimates.accuracy_of(margins, questions),
                 margin=estimates.mean_of(margins, questions), metrics=metrics,
                 settings={"seq_length": seq_len}, slices=slices, **about)


def pair_records(values: PairValues, scored: Scored, source: ScoreData) -> Iterator[dict[str, Any]]:
    """One JSON object for each pair."""
    types = source.types(scored)
    for pair in range(len(scored.numbers)):
        line = source.describe(scored, pair) | {"prompt": int(values.prompts[pair])}
        if types.names:
            line["type"] = types.name(pair)
        for column, side in enumerate(SIDES):
            line[f"{side}_tokens"] = int(values.tokens[pair, column])
            line[f"{side}_logps"] = float(values.logps[pair, column])
            if values.references is not None:
                line[f"reference_{side}_logps"] = float(values.references[pair, column])
                line[f"{side}_reward"] = float(values.rewards[pair, column])
        yield line | {"margin": float(values.margins[pair])}
