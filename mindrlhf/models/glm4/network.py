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


def pick(values: Tensor, answers: Tensor) -> Tensor:
    """The values of each pair's answer. One that is not finite does not spread to other pairs.

    Args:
        values: float32 (B, A), of the answers of each row.
        answers: int32 (B, P), an answer for each pair, counted from 0; -1: none.

    Returns:
        float32 (B, P), 0 where there is no answer.
    """
    numbers = ops.arange(values.shape[1]).astype(ms.int32).reshape((1, 1, -1))
    is_answer = ops.equal(answers.expand_dims(2), numbers)  # (B, P, A)
    candidates = ops.tile(values.expand_dims(1), (1, answers.shape[1], 1))
    return ops.select(is_answer, candidates, ops.zeros_like(candidates)).sum(2)


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
        self.both = ops.LogicalAnd().shard((rows, rows))
        self.either = ops.LogicalOr().shard((rows, rows))
        self.or_later = ops.LogicalOr().shard(((1, 1, 1), rows))
        self.mask_cast = ops.Cast().shard((rows,))
        self.mask_expand = ops.ExpandDims().shard((rows,))
        # the dtype that the attention cell takes
        self.mask_dtype = ms.uint8 if config.use_flash_attention else ms.float32
        self.sequence_logps = SequenceLogps(
            self.transformer.output_layer, config.vocab_size, vocab_shards=plan.vocabulary_shards,
            chunk_size=dpo.logps_chunk_size, trained=not config.lora)
        self.transformer.output_layer.weight.name = OUTPUT  # SequenceLogps has renamed it
        self.rotary = RotaryCache(self.transformer.freqs_mgr)

    def attention_mask(self, group_ids: Tensor, answer_ids: Tensor) -> Tensor:
        """Mask of packed rows: 0 where a position attends, 1 elsewhere.

        A position attends to itself and earlier positions of its group, if they belong to the
        prompt or to its own answer.

        int32 (B, S) each -> (B, 1, S, S), uint8 for flash attention, else float32.
        """
        place = ops.arange(group_ids.shape[1])
        later = place.reshape((1, 1, -1)) > place.reshape((1, -1, 1))
        other_group = self.differ(group_ids.expand_dims(2), group_ids.expand_dims(1))
        other_answer = self.both(
            self.differ(answer_ids.expand_dims(2), answer_ids.expand_dims(1)),
            (answer_ids > 0).expand_dims(1))
        hidden = self.or_later(later, self.either(other_group, other_answer))
        mask = self.mask_cast(hidden, self.mask_dtype)
        return ops.stop_gradient(self.mask_expand(mask, 1))  # MindSpore reduces no uint8 gradients

    def hidden_states(self, input_ids: Tensor, group_ids: Tensor, answer_ids: Tensor,
                      positions: Tensor) -> Tensor:
        """int32 (B, S) each, see features.row_inputs -> the output layer's input, (B, S, H)."""
        mask = self.attention_mask(group_ids, answer_ids)
        embedded = self.transformer.embedding(input_ids)
        return self.transformer.encoder(embedded, mask, self.rotary(positions))

    def answer_logps(self, inputs: tuple, answers: int) -> Tensor:
        """Log-probabilities of the answers in B rows.

        Args:
            inputs: int32 (B, S) each, in the order of records.INPUTS.
            answers: A, the largest number of answers in a row.

        Returns:
            float32 (B, A), 0 for answers that a row does not have.
        """
        answer_ids = inputs[PLACE["answer_ids"]]
        hidden = self.hidden_states(inputs[PLACE["input_ids"]], inputs[PLACE["group_ids"]],
                                    answer_ids, inputs[PLACE["positions"]])
        return self.sequence_logps(hidden, inputs[PLACE["labels"]], answer_ids, answers)

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
        references = columns[PLACE["reference_logps"]]
        logps = self.answer_logps(columns, references.shape[1])
        chosen_at, rejected_at = columns[PLACE["chosen"]], columns[PLACE["rejected"]]
        tokens = columns[PLACE["answer_tokens"]].astype(ms.float32)
        chosen, rejected = pick(logps, chosen_at), pick(logps, rejected_at)
        chosen_tokens, rejected_tokens = pick(tokens, chosen_at), pick(tokens, rejected_at)
        exists = (pair_ids >= 0).astype(ms.float32)
        chosen_logratio = chosen - pick(references, chosen_at)
        rejected_logratio = rejected - pick(references, rejected_at)
        chosen_term, rejected_term = chosen_logratio, rejected_logratio
        if self.per_token:
            chosen_term = chosen_logratio / ops.maximum(chosen_tokens, 1.0)
            rejected_term = rejected_logratio / ops.maximum(rejected_tokens, 1.0)
        losses = exists * self.pair_loss(chosen_term - rejected_term, self.beta,
                                         self.label_smoothing)
        loss = self.part_of_loss(losses, -chosen, weights)
        is_token = (columns[PLACE["group_ids"]] > 0).astype(ms.float32)
        sums = {
            "pairs": exists.sum(),
            "positions": ops.ones_like(is_token).sum(),
            "tokens": is_token.sum(),
            "chosen_tokens": chosen_tokens.sum(),
            "rejected_tokens": rejected_tokens.sum(),
            "dpo_loss": losses.sum(),
            "sft_nll": -chosen.sum(),
            "chosen_logps": chosen.sum(),
            "rejected_logps": rejected.sum(),
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


class RotaryCache(nn.Cell):
    """MindFormers' rotary embedding, for the positions that a row gives its tokens.

    Args:
        frequencies: the model's FreqsMgr.
    """

    def __init__(self, frequencies: nn.Cell):
        super().__init__(auto_prefix=False)
        self.frequencies = frequencies

    def construct(self, positions: Tensor) -> tuple:
        """int32 (B, S) -> the encoder's rotary_pos_emb; training reads the cache, (B, S, R, 2)."""
        cosines, sines, cache = self.frequencies(positions.shape[1])
        return cosines, sines, ops.gather(cache, positions, 0)


class ReferenceLogps(nn.Cell):
    """Glm4DPO as the reference model: log-probabilities only.

    Args:
        model: the network.
        answers: A, the largest number of answers in a row.
    """

    def __init__(self, model: Glm4DPO, answers: int):
        super().__init__(auto_prefix=False)
        self.model, self.answers = model, answers

    def construct(self, *inputs: Tensor) -> Tensor:
        """int32 (B, S) each, in the order of records.INPUTS -> log-probs, float32 (B, A)."""
        return self.model.answer_logps(inputs, self.answers)
