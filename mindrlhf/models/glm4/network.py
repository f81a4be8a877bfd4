"""GLM-4 with the DPO loss on top of MindFormers' ChatGLM2 network."""
import mindspore as ms
from mindformers import ChatGLM2ForConditionalGeneration
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import nn, ops

from mindrlhf import runtime
from mindrlhf.losses import SequenceLogps, dpo_loss

OUTPUT_WEIGHT = "transformer.output_layer.weight"


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class Glm4DPO(ChatGLM2ForConditionalGeneration):
    """Loss and metrics of a batch of packed rows.

    Args:
        config: ChatGLM2Config with two attributes more, `dpo` and `lora`: those sections of the YAML.
    """

    def __init__(self, config):
        super().__init__(config)
        plan, dpo = config.parallel_config, config.dpo
        self.beta, self.loss_type = dpo.beta, dpo.loss_type
        self.label_smoothing, self.sft_weight = dpo.label_smoothing, dpo.sft_weight
        self.per_token = dpo.average_log_prob or dpo.loss_type == "ipo"
        rows = (plan.data_parallel, 1, 1)  # of the mask, which would be gathered in every layer without strategies
        self.differ, self.either = ops.NotEqual().shard((rows, rows)), ops.LogicalOr().shard(((1, 1, 1), rows))
        self.mask_cast, self.mask_expand = ops.Cast().shard((rows,)), ops.ExpandDims().shard((rows,))
        self.mask_dtype = runtime.attention_mask_dtype(config)
        shards = 1 if plan.vocab_emb_dp else plan.data_parallel * plan.model_parallel
        self.sequence_logps = SequenceLogps(self.transformer.output_layer, config.vocab_size, vocab_shards=shards,
                                            chunk_size=dpo.logps_chunk_size, trained=not config.lora)
        self.transformer.output_layer.weight.name = OUTPUT_WEIGHT  # its second parent gave it another

    def attention_mask(self, segment_ids):
        """int32 (B, S) -> (B, 1, S, S), 1 where a position must not look: ahead of itself, or into another segment."""
        place = ops.arange(segment_ids.shape[1])
        ahead = place.reshape((1, 1, -1)) > place.reshape((1, -1, 1))
        apart = self.differ(segment_ids.expand_dims(2), segment_ids.expand_dims(1))
        mask = self.mask_cast(self.either(ahead, apart), self.mask_dtype)
        return ops.stop_gradient(self.mask_expand(mask, 1))  # of uint8 there are no gradients to reduce

    def pair_logps(self, chosen, rejected, pairs):
        """Log-probabilities of both answers of each pair, in one forward pass.

        Args:
            chosen, rejected: (input_ids, labels, loss_mask, segment_ids), int32 (B, S) each.
            pairs: int, P.

        Returns:
            (log-probs, token counts), float32 (2B, P): the chosen side's rows, then the rejected side's.
        """
        input_ids, labels, loss_mask, segment_ids = (
            ops.concat((chosen[0], rejected[0])), ops.concat((chosen[1], rejected[1])),
            ops.concat((chosen[2], rejected[2])), ops.concat((chosen[3], rejected[3])))
        hidden = self.transformer(input_ids=input_ids, full_attention_mask=self.attention_mask(segment_ids))
        return self.sequence_logps(hidden, labels, loss_mask, segment_ids, pairs)

    def construct(self, chosen_input_ids, chosen_labels, chosen_loss_mask, chosen_segment_ids, chosen_ref_logps,
                  rejected_input_ids, rejected_labels, rejected_loss_mask, rejected_segment_ids, rejected_ref_logps,
                  pair_ids, weights):
        """Columns of a batch, in the order of mindrecord.COLUMNS, and weights, to (loss, sums, faulty).

        Args:
            weights: float32 (B or 1, 2), for each row the weight of a pair's loss and of a chosen token's negative
                log-likelihood: 1 / pairs and 1 / chosen tokens of the global batch. So the losses and the gradients of
                its parts (workers, accumulation) add up to those of the whole, however the pairs are spread over rows.

        Returns:
            loss: float32 (), the part of the global loss.
            sums: float32, those of metrics.SUMS over this batch.
            faulty: int32 (B, P), pair_ids where a pair's loss is not finite, elsewhere -1. Not bool: evaluation in a plan
                gathers what the network returns, and Ascend's AllGather takes no bool.
        """
        batch, pairs = pair_ids.shape
        logps, counts = self.pair_logps(
            (chosen_input_ids, chosen_labels, chosen_loss_mask, chosen_segment_ids),
            (rejected_input_ids, rejected_labels, rejected_loss_mask, rejected_segment_ids), pairs)
        chosen, rejected = logps[:batch], logps[batch:]
        chosen_tokens, rejected_tokens = counts[:batch], counts[batch:]
        there = (pair_ids >= 0).astype(ms.float32)
        chosen_logratio = (chosen - chosen_ref_logps) * there
        rejected_logratio = (rejected - rejected_ref_logps) * there
        chosen_term, rejected_term = chosen_logratio, rejected_logratio
        if self.per_token:
            chosen_term = chosen_logratio / ops.maximum(chosen_tokens, 1.0)
            rejected_term = rejected_logratio / ops.maximum(rejected_tokens, 1.0)
        losses = there * dpo_loss(chosen_term, rejected_term, beta=self.beta, loss_type=self.loss_type,
                                  label_smoothing=self.label_smoothing)
        nll = -chosen * there
        loss = (losses * weights[:, :1]).sum()
        if self.sft_weight > 0:
            loss += self.sft_weight * (nll * weights[:, 1:]).sum()
        tokens = (chosen_segment_ids > 0).astype(ms.float32).sum() + (rejected_segment_ids > 0).astype(ms.float32).sum()
        correct = (chosen_term > rejected_term).astype(ms.float32)
        sums = ops.stack((
            there.sum(), tokens, (chosen_tokens * there).sum(), (rejected_tokens * there).sum(), losses.sum(), nll.sum(),
            (chosen * there).sum(), (rejected * there).sum(),
            self.beta * chosen_term.sum(), self.beta * rejected_term.sum(),
            correct.sum(), (ops.abs(chosen_logratio) + ops.abs(rejected_logratio)).sum()))
        finite = ops.isfinite(losses).astype(ms.int32)
        return loss, ops.stop_gradient(sums), pair_ids - finite * (pair_ids + 1)


class ReferenceLogps(nn.Cell):
    """Glm4DPO as the reference model: log-probabilities only."""

    def __init__(self, model, pairs):
        super().__init__(auto_prefix=False)
        self.model, self.pairs = model, pairs

    def construct(self, *columns):
        """The chosen side's four int32 (B, S) columns, then the rejected side's -> float32 (2B, P)."""
        return self.model.pair_logps(columns[:4], columns[4:], self.pairs)[0]
