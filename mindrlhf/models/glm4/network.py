"""GLM-4 with the DPO loss on top of MindFormers' ChatGLM2 network."""
from __future__ import annotations

from typing import Any

import mindspore as ms
from mindformers import ChatGLM2ForConditionalGeneration
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Tensor, nn, ops

from mindrlhf.logps import SequenceLogps
from mindrlhf.losses import get_loss
from mindrlhf.models.glm4.weight_names import OUTPUT
from mindrlhf.records import PLACE, SUMS


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class Glm4DPO(ChatGLM2ForConditionalGeneration):
    """Loss and sums of a batch of packed rows.

    Args:
        config: ChatGLM2Config with three more attributes: `dpo` and `lora`, sections of the YAML,
            and `plan`, a parallel.Plan.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        plan, dpo = config.plan, config.dpo
        self.pair_loss, self.beta = get_loss(dpo.loss_type), dpo.beta
        self.label_smoothing, self.sft_weight = dpo.label_smoothing, dpo.sft_weight
        self.per_token = dpo.average_log_prob or dpo.loss_type == "ipo"
        # Without strategies for the mask, MindSpore would gather it in every layer.
        rows = (plan.data if plan.is_sharded else 1, 1, 1)
        self.differ = ops.NotEqual().shard((rows, rows))
        self.either = ops.LogicalOr().shard(((1, 1, 1), rows))
        self.mask_cast = ops.Cast().shard((rows,))
        self.mask_expand = ops.ExpandDims().shard((rows,))
        # the dtype that the attention cell takes
        self.mask_dtype = ms.uint8 if config.use_flash_attention else ms.float32
        self.sequence_logps = SequenceLogps(
            self.transformer.output_layer, config.vocab_size, vocab_shards=plan.vocabulary_shards,
            chunk_size=dpo.logps_chunk_size, trained=not config.lora)
        self.transformer.output_layer.weight.name = OUTPUT  # SequenceLogps has renamed it

    def attention_mask(self, segment_ids: Tensor) -> Tensor:
        """Mask of packed rows: 1 at later positions and at positions of other segments, else 0.

        int32 (B, S) -> (B, 1, S, S), uint8 for flash attention, else float32.
        """
        place = ops.arange(segment_ids.shape[1])
        ahead = place.reshape((1, 1, -1)) > place.reshape((1, -1, 1))
        apart = self.differ(segment_ids.expand_dims(2), segment_ids.expand_dims(1))
        mask = self.mask_cast(self.either(ahead, apart), self.mask_dtype)
        return ops.stop_gradient(self.mask_expand(mask, 1))  # MindSpore reduces no uint8 gradients

    def answer_logps(self, input_ids: Tensor, labels: Tensor, loss_mask: Tensor,
                     segment_ids: Tensor, pairs: int) -> tuple:
        """Log-probabilities of the answers in N rows.

        Args:
            input_ids, labels, loss_mask, segment_ids: int32 (N, S), see features.row_columns.
            pairs: P, the largest number of segments in a row.

        Returns:
            (log-probs, numbers of scored tokens), both float32 (N, P). Entries of segments that a
            row does not have are 0.
        """
        hidden = self.transformer(input_ids=input_ids,
                                  full_attention_mask=self.attention_mask(segment_ids))
        return self.sequence_logps(hidden, labels, loss_mask, segment_ids, pairs)

    def both_sides(self, columns: tuple, pairs: int) -> tuple:
        """answer_logps() of the chosen and the rejected side, in one forward pass.

        Args:
            columns: of B rows, in the order of records.COLUMNS.
            pairs: P, the largest number of pairs in a row.

        Returns:
            (log-probs, numbers of scored tokens), both float32 (2 B, P), the chosen side first.
        """
        return self.answer_logps(
            ops.concat((columns[PLACE["chosen_input_ids"]], columns[PLACE["rejected_input_ids"]])),
            ops.concat((columns[PLACE["chosen_labels"]], columns[PLACE["rejected_labels"]])),
            ops.concat((columns[PLACE["chosen_loss_mask"]], columns[PLACE["rejected_loss_mask"]])),
            ops.concat((columns[PLACE["chosen_segment_ids"]],
                        columns[PLACE["rejected_segment_ids"]])), pairs)

    def part_of_loss(self, losses: Tensor, nll: Tensor, weights: Tensor) -> Tensor:
        """The loss of these rows: DPO, and SFT if sft_weight is above 0.

        Args:
            losses: float32 (B, P), DPO loss of each pair, 0 where there is none.
            nll: float32 (B, P), -log pi(y_w|x), 0 where there is no pair.
            weights: as in construct().

        Returns:
            float32 ().
        """
        loss = (losses * weights[:, :1]).sum()
        if self.sft_weight > 0:
            loss += self.sft_weight * (nll * weights[:, 1:]).sum()
        return loss

    def construct(self, columns: tuple, weights: Tensor) -> tuple:
        """Loss and metrics of a batch.

        Args:
            columns: of B rows, in the order of records.COLUMNS.
            weights: float32 (B or 1, 2): the weight of a row's pairs in the DPO loss, and of its
                chosen tokens in the SFT loss. They are 1 / pairs and 1 / chosen tokens of the
                global batch. So losses and gradients of its parts (workers, accumulation steps) add
                up to those of the batch, however the pairs are distributed over rows.

        Returns:
            loss: float32 (), this part of the global loss.
            sums: float32 (len(SUMS),), records.SUMS over these rows.
            faulty: int32 (B, P), pair_ids of pairs whose loss is not finite, else -1. It is not
                bool because evaluation in a plan gathers it, and Ascend's AllGather takes no bool.
        """
        pair_ids = columns[PLACE["pair_ids"]]
        batch, pairs = pair_ids.shape
        logps, counts = self.both_sides(columns, pairs)
        chosen, rejected = logps[:batch], logps[batch:]
        chosen_tokens, rejected_tokens = counts[:batch], counts[batch:]
        exists = (pair_ids >= 0).astype(ms.float32)
        chosen_logratio = (chosen - columns[PLACE["chosen_ref_logps"]]) * exists
        rejected_logratio = (rejected - columns[PLACE["rejected_ref_logps"]]) * exists
        chosen_term, rejected_term = chosen_logratio, rejected_logratio
        if self.per_token:
            chosen_term = chosen_logratio / ops.maximum(chosen_tokens, 1.0)
            rejected_term = rejected_logratio / ops.maximum(rejected_tokens, 1.0)
        margins = chosen_term - rejected_term
        losses = exists * self.pair_loss(margins, self.beta, self.label_smoothing)
        nll = -chosen * exists
        loss = self.part_of_loss(losses, nll, weights)
        chosen_positions = (columns[PLACE["chosen_segment_ids"]] > 0).astype(ms.float32)
        rejected_positions = (columns[PLACE["rejected_segment_ids"]] > 0).astype(ms.float32)
        sums = {
            "pairs": exists.sum(),
            "tokens": chosen_positions.sum() + rejected_positions.sum(),
            "chosen_tokens": (chosen_tokens * exists).sum(),
            "rejected_tokens": (rejected_tokens * exists).sum(),
            "dpo_loss": losses.sum(),
            "sft_nll": nll.sum(),
            "chosen_logps": (chosen * exists).sum(),
            "rejected_logps": (rejected * exists).sum(),
            "chosen_reward": self.beta * chosen_term.sum(),
            "rejected_reward": self.beta * rejected_term.sum(),
            "correct": (chosen_term > rejected_term).astype(ms.float32).sum(),
            "logratio_size": (ops.abs(chosen_logratio) + ops.abs(rejected_logratio)).sum()}
        finite = ops.isfinite(losses).astype(ms.int32)
        faulty = pair_ids - finite * (pair_ids + 1)
        in_order = ()  # a tuple: a list would stay in the graph as an operator
        for name in SUMS:
            in_order += (sums[name],)  # type: ignore[assignment]
        return loss, ops.stop_gradient(ops.stack(in_order)), faulty


class ReferenceLogps(nn.Cell):
    """Glm4DPO as the reference model: log-probabilities only.

    Args:
        model: the network.
        pairs: P, the largest number of segments in a row.
    """

    def __init__(self, model: Glm4DPO, pairs: int):
        super().__init__(auto_prefix=False)
        self.model, self.pairs = model, pairs

    def construct(self, input_ids: Tensor, labels: Tensor, loss_mask: Tensor,
                  segment_ids: Tensor) -> Tensor:
        """int32 (N, S) each -> log-probs float32 (N, P)."""
        return self.model.answer_logps(input_ids, labels, loss_mask, segment_ids, self.pairs)[0]
