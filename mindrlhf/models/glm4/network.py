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
        config: ChatGLM2Config with three more attributes: `dpo` and `lora`, sections of the YAML, and `plan`, the
            parallel.Plan.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        plan, dpo = config.plan, config.dpo
        self.pair_loss, self.beta, self.label_smoothing = get_loss(dpo.loss_type), dpo.beta, dpo.label_smoothing
        self.sft_weight, self.per_token = dpo.sft_weight, dpo.average_log_prob or dpo.loss_type == "ipo"
        # strategies for the mask: without them MindSpore would gather it in every layer
        rows = (plan.data if plan.is_sharded else 1, 1, 1)
        self.differ, self.either = ops.NotEqual().shard((rows, rows)), ops.LogicalOr().shard(((1, 1, 1), rows))
        self.mask_cast, self.mask_expand = ops.Cast().shard((rows,)), ops.ExpandDims().shard((rows,))
        self.mask_dtype = ms.uint8 if config.use_flash_attention else ms.float32  # what the attention cell takes
        self.sequence_logps = SequenceLogps(
            self.transformer.output_layer, config.vocab_size, vocab_shards=plan.vocabulary_shards,
            chunk_size=dpo.logps_chunk_size, trained=not config.lora)
        self.transformer.output_layer.weight.name = OUTPUT  # its second parent gave it another name

    def attention_mask(self, segment_ids: Tensor) -> Tensor:
        """int32 (B, S) -> (B, 1, S, S), 1 where a position must not look: ahead of itself, or at another segment."""
        place = ops.arange(segment_ids.shape[1])
        ahead = place.reshape((1, 1, -1)) > place.reshape((1, -1, 1))
        apart = self.differ(segment_ids.expand_dims(2), segment_ids.expand_dims(1))
        mask = self.mask_cast(self.either(ahead, apart), self.mask_dtype)
        return ops.stop_gradient(self.mask_expand(mask, 1))  # of uint8 there are no gradients to reduce

    def answer_logps(self, input_ids: Tensor, labels: Tensor, loss_mask: Tensor, segment_ids: Tensor, pairs: int) -> tuple:
        """Log-probabilities of the answers in some rows.

        Args:
            input_ids, labels, loss_mask, segment_ids: int32 (N, S), see features.row_columns.
            pairs: P, the most segments of a row.

        Returns:
            (log-probs, numbers of scored tokens), float32 (N, P); 0 for segments that are not there.
        """
        hidden = self.transformer(input_ids=input_ids, full_attention_mask=self.attention_mask(segment_ids))
        return self.sequence_logps(hidden, labels, loss_mask, segment_ids, pairs)

    def construct(self, columns: tuple, weights: Tensor) -> tuple:
        """Loss of a batch, and what its metrics need.

        Args:
            columns: tuple of B rows' columns, in the order of records.COLUMNS.
            weights: float32 (B or 1, 2): what a row's pair weighs in the loss, and a chosen token's negative
                log-likelihood in the SFT term. They are 1 / pairs and 1 / chosen tokens of the global batch, so the losses and
                gradients of its parts (workers, accumulation) add up to its own, however the pairs are spread over rows.

        Returns:
            loss: float32 (), this part of the global loss.
            sums: float32 (len(SUMS),), records.SUMS over these rows.
            faulty: int32 (B, P), pair_ids where a pair's loss is not finite, else -1. Not bool: evaluation in a plan
                gathers it, and Ascend's AllGather takes no bool.
        """
        pair_ids, chosen_segments = columns[PLACE["pair_ids"]], columns[PLACE["chosen_segment_ids"]]
        rejected_segments = columns[PLACE["rejected_segment_ids"]]
        batch, pairs = pair_ids.shape
        logps, counts = self.answer_logps(  # both sides in one forward pass
            ops.concat((columns[PLACE["chosen_input_ids"]], columns[PLACE["rejected_input_ids"]])),
            ops.concat((columns[PLACE["chosen_labels"]], columns[PLACE["rejected_labels"]])),
            ops.concat((columns[PLACE["chosen_loss_mask"]], columns[PLACE["rejected_loss_mask"]])),
            ops.concat((chosen_segments, rejected_segments)), pairs)
        chosen, rejected = logps[:batch], logps[batch:]
        chosen_tokens, rejected_tokens = counts[:batch], counts[batch:]
        exists = (pair_ids >= 0).astype(ms.float32)
        chosen_logratio = (chosen - columns[PLACE["chosen_ref_logps"]]) * exists
        rejected_logratio = (rejected - columns[PLACE["rejected_ref_logps"]]) * exists
        chosen_term, rejected_term = chosen_logratio, rejected_logratio
        if self.per_token:
            chosen_term = chosen_logratio / ops.maximum(chosen_tokens, 1.0)
            rejected_term = rejected_logratio / ops.maximum(rejected_tokens, 1.0)
        losses = exists * self.pair_loss(chosen_term - rejected_term, self.beta, self.label_smoothing)
        nll = -chosen * exists
        loss = (losses * weights[:, :1]).sum()
        if self.sft_weight > 0:
            loss += self.sft_weight * (nll * weights[:, 1:]).sum()
        sums = {
            "pairs": exists.sum(),
            "tokens": (chosen_segments > 0).astype(ms.float32).sum() + (rejected_segments > 0).astype(ms.float32).sum(),
            "chosen_tokens": (chosen_tokens * exists).sum(), "rejected_tokens": (rejected_tokens * exists).sum(),
            "dpo_loss": losses.sum(), "sft_nll": nll.sum(),
            "chosen_logps": (chosen * exists).sum(), "rejected_logps": (rejected * exists).sum(),
            "chosen_reward": self.beta * chosen_term.sum(), "rejected_reward": self.beta * rejected_term.sum(),
            "correct": (chosen_term > rejected_term).astype(ms.float32).sum(),
            "logratio_size": (ops.abs(chosen_logratio) + ops.abs(rejected_logratio)).sum()}
        finite = ops.isfinite(losses).astype(ms.int32)
        faulty = pair_ids - finite * (pair_ids + 1)
        return loss, ops.stop_gradient(ops.stack([sums[name] for name in SUMS])), faulty


class ReferenceLogps(nn.Cell):
    """Glm4DPO as the reference model: log-probabilities only.

    Args:
        model: the network.
        pairs: P, the most segments of a row.
    """

    def __init__(self, model: Glm4DPO, pairs: int):
        super().__init__(auto_prefix=False)
        self.model, self.pairs = model, pairs

    def construct(self, input_ids: Tensor, labels: Tensor, loss_mask: Tensor, segment_ids: Tensor) -> Tensor:
        """int32 (N, S) each -> log-probs float32 (N, P)."""
        return self.model.answer_logps(input_ids, labels, loss_mask, segment_ids, self.pairs)[0]
