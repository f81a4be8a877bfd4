"""From the sums that a training step returns to metrics."""
from mindrlhf.records import SUMS


def compute_metrics(sums, *, sft_weight):
    """Sums over any number of pairs -> metrics per pair.

    Args:
        sums: sequence of numbers in the order of SUMS.
        sft_weight: weight of the SFT term in the loss.

    Returns:
        dict: loss = dpo_loss + sft_weight * sft_loss; dpo_loss, rewards and accuracy are means over pairs (a tie is no
        success); sft_loss is per chosen token. chosen_logps and rejected_logps are nats an answer, with _per_token nats
        a scored token. logratio_size is the mean over answers of |log pi - log pi_ref|: 0 where policy and reference
        are the same. pairs and tokens (both sides, prompts included) are counts.
    """
    if len(sums) != len(SUMS):
        raise ValueError(f"{len(SUMS)} sums expected, got {len(sums)}")
    total = dict(zip(SUMS, map(float, sums)))
    pairs = max(total["pairs"], 1.0)
    result = {"dpo_loss": total["dpo_loss"] / pairs, "sft_loss": total["sft_nll"] / max(total["chosen_tokens"], 1.0),
              "accuracy": total["correct"] / pairs,
              "margin": (total["chosen_reward"] - total["rejected_reward"]) / pairs}
    for side in ("chosen", "rejected"):
        logps = total[f"{side}_logps"]
        result |= {f"{side}_reward": total[f"{side}_reward"] / pairs, f"{side}_logps": logps / pairs,
                   f"{side}_logps_per_token": logps / max(total[f"{side}_tokens"], 1.0)}
    return {"loss": result["dpo_loss"] + sft_weight * result["sft_loss"], **result,
            "logratio_size": total["logratio_size"] / (2 * pairs), "pairs": int(total["pairs"]),
            "tokens": int(total["tokens"])}
