"""Metrics of a batch, from the sums that a training step returns."""
from __future__ import annotations

from collections.abc import Sequence

from mindrlhf.records import SIDES, SUMS


def compute_metrics(sums: Sequence[float], *, sft_weight: float) -> dict[str, float]:
    """Metrics per pair, from sums over any number of pairs.

    Args:
        sums: in the order of records.SUMS.
        sft_weight: weight of the SFT term in the loss.

    Returns:
        name -> value; names that TRL has are TRL's. loss = dpo_loss + sft_weight * sft_loss.
        dpo_loss and rewards/* are means over pairs; a tie does not count as accurate. sft_loss is
        nats per chosen token, logps/* per answer, logps/*_per_token per token. logratio_size is the
        mean over answers of |log pi - log pi_ref|, which is 0 where policy and reference are the
        same. pairs and tokens (prompts included, shared ones once) are counts, padding is the share
        of all positions that hold no token.

    Raises:
        ValueError: there are more or fewer sums than in SUMS.
    """
    if len(sums) != len(SUMS):
        raise ValueError(f"{len(SUMS)} sums expected, got {len(sums)}")
    total = dict(zip(SUMS, map(float, sums)))
    pairs = max(total["pairs"], 1.0)
    result = {
        "dpo_loss": total["dpo_loss"] / pairs,
        "sft_loss": total["sft_nll"] / max(total["chosen_tokens"], 1.0),
        "rewards/accuracies": total["correct"] / pairs,
        "rewards/margins": (total["chosen_reward"] - total["rejected_reward"]) / pairs}
    for side in SIDES:
        logps = total[f"{side}_logps"]
        result |= {
            f"rewards/{side}": total[f"{side}_reward"] / pairs,
            f"logps/{side}": logps / pairs,
            f"logps/{side}_per_token": logps / max(total[f"{side}_tokens"], 1.0)}
    return {
        "loss": result["dpo_loss"] + sft_weight * result["sft_loss"], **result,
        "logratio_size": total["logratio_size"] / (2 * pairs),
        "pairs": int(total["pairs"]), "tokens": int(total["tokens"]),
        "padding": 1 - total["tokens"] / max(total["positions"], 1.0)}
