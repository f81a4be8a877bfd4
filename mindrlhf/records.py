"""What passes between data, network and training step, each named once: columns, sums, and a step's outputs.

MindSpore hands tensors on by position. PLACE turns a column's name into its position, so that nothing else
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
        size: its one dimension: "seq_len" positions (S) or "pairs" (P), the most pairs in a row of the file.
    """
    dtype: str
    size: str


SIDES = ("chosen", "rejected")
INPUTS = ("input_ids", "labels", "loss_mask", "segment_ids")  # columns of a side, int32 (S,); see data/features.py
COLUMNS = {
    "chosen_input_ids": Column("int32", "seq_len"),
    "chosen_labels": Column("int32", "seq_len"),
    "chosen_loss_mask": Column("int32", "seq_len"),
    "chosen_segment_ids": Column("int32", "seq_len"),
    "chosen_ref_logps": Column("float32", "pairs"),  # nats, of the chosen answer under the reference
    "rejected_input_ids": Column("int32", "seq_len"),
    "rejected_labels": Column("int32", "seq_len"),
    "rejected_loss_mask": Column("int32", "seq_len"),
    "rejected_segment_ids": Column("int32", "seq_len"),
    "rejected_ref_logps": Column("float32", "pairs"),
    "pair_ids": Column("int32", "pairs")}  # numbers in the source, -1 where there is no pair
PLACE = {name: place for place, name in enumerate(COLUMNS)}

# Over the pairs of a batch, as Glm4DPO returns them: counts of pairs, of tokens (both sides, prompts included) and of
# scored tokens; then sums of losses, of -log pi(y_w|x), of log-probs, of rewards, of "chosen reward is larger", and of
# |log pi - log pi_ref| over both answers.
SUMS = ("pairs", "tokens", "chosen_tokens", "rejected_tokens", "dpo_loss", "sft_nll", "chosen_logps", "rejected_logps",
        "chosen_reward", "rejected_reward", "correct", "logratio_size")


class StepOutput(NamedTuple):
    """What a training step returns; MindSpore hands it to callbacks as a plain tuple.

    Attributes:
        loss: float32 (), of the global batch.
        overflow: bool (), whether a gradient was not finite, and so no weight changed.
        loss_scale: 1; MindFormers expects it in this place.
        learning_rate: float32 ().
        grad_norm: float32 (), before clipping.
        sums: float32 (len(SUMS),), over the global batch.
        pair_ids: int32 (rows, P), the column.
        faulty: int32 (rows of this card, P): pair_ids where a pair's loss is not finite, else -1.
    """
    loss: Tensor
    overflow: Tensor
    loss_scale: Tensor
    learning_rate: Tensor
    grad_norm: Tensor
    sums: Tensor
    pair_ids: Tensor
    faulty: Tensor
