"""Names of what passes between data, network and training step: columns, sums, a step's outputs.

MindSpore passes tensors by position. PLACE maps a column's name to its position, so no other code
depends on the order.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mindspore import Tensor


class Column(NamedTuple):
    """A column of a row of training data.

    Attributes:
        dtype: "int32" or "float32".
        size: its only dimension: "seq_len", the positions of a row (S), or "pairs", the most pairs
            in a row of the file (P).
    """
    dtype: str
    size: str


SIDES = ("chosen", "rejected")
INPUTS = ("input_ids", "labels", "loss_mask", "segment_ids")  # int32 (S,) each; data/features.py
COLUMNS = {
    "chosen_input_ids": Column("int32", "seq_len"),
    "chosen_labels": Column("int32", "seq_len"),
    "chosen_loss_mask": Column("int32", "seq_len"),
    "chosen_segment_ids": Column("int32", "seq_len"),
    "chosen_ref_logps": Column("float32", "pairs"),  # reference log-probs of the answers, nats
    "rejected_input_ids": Column("int32", "seq_len"),
    "rejected_labels": Column("int32", "seq_len"),
    "rejected_loss_mask": Column("int32", "seq_len"),
    "rejected_segment_ids": Column("int32", "seq_len"),
    "rejected_ref_logps": Column("float32", "pairs"),
    "pair_ids": Column("int32", "pairs")}  # row numbers in the source, -1 where there is no pair
PLACE = {name: place for place, name in enumerate(COLUMNS)}

# Sums over the pairs of a batch, as Glm4DPO returns them.
SUMS = (
    "pairs",  # number of pairs
    "tokens",  # of both sides, prompts included
    "chosen_tokens",  # scored tokens
    "rejected_tokens",
    "dpo_loss",
    "sft_nll",  # -log pi(y_w|x)
    "chosen_logps",
    "rejected_logps",
    "chosen_reward",
    "rejected_reward",
    "correct",  # pairs with a larger chosen reward
    "logratio_size")  # |log pi - log pi_ref|, over both answers


class StepOutput(NamedTuple):
    """Outputs of a training step; MindSpore passes them to callbacks as a plain tuple.

    Attributes:
        loss: float32 (), of the global batch.
        overflow: bool (), whether a gradient was not finite, so that no weight changed.
        loss_scale: 1; MindFormers expects it at this position.
        learning_rate: float32 ().
        grad_norm: float32 (), before clipping.
        sums: float32 (len(SUMS),), over the global batch.
        pair_ids: int32 (rows, P), the column.
        faulty: int32 (rows of this card, P): pair_ids of pairs whose loss is not finite, else -1.
    """
    loss: Tensor
    overflow: Tensor
    loss_scale: Tensor
    learning_rate: Tensor
    grad_norm: Tensor
    sums: Tensor
    pair_ids: Tensor
    faulty: Tensor
