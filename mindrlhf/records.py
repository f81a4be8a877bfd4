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
        size: its only dimension: "seq_len", the positions of a row (S), "answers" or "pairs", the
            most answers (A) or pairs (P) in a row of the file.
        filler: the value where a row has no answer or no pair.
    """
    dtype: str
    size: str
    filler: int = 0


SIDES = ("chosen", "rejected")
INPUTS = {  # what the model sees; data/features.py builds it
    "input_ids": Column("int32", "seq_len"),
    "labels": Column("int32", "seq_len"),
    "group_ids": Column("int32", "seq_len"),  # 1, 2, ... for each group, 0 for padding
    "answer_ids": Column("int32", "seq_len"),  # 1, 2, ... for each answer of the row, else 0
    "positions": Column("int32", "seq_len")}  # of the rotary embedding
COLUMNS = {
    **INPUTS,
    "reference_logps": Column("float32", "answers"),  # log-prob of each answer, nats
    "answer_tokens": Column("int32", "answers"),  # scored tokens of each answer
    "chosen": Column("int32", "pairs", -1),  # answer of each pair, counted from 0 in the row
    "rejected": Column("int32", "pairs", -1),
    "pair_ids": Column("int32", "pairs", -1)}  # row number of each pair in the source
PLACE = {name: place for place, name in enumerate(COLUMNS)}

# Sums over the pairs of a batch, as Glm4DPO returns them.
SUMS = (
    "pairs",  # number of pairs
    "positions",  # of all rows, padding included
    "tokens",  # positions that are not padding
    "chosen_tokens",  # scored tokens of each pair's answers
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
        overflow: bool (), whether a gradient or a sum was not finite, so that no weight changed.
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
