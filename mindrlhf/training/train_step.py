"""One training step: loss, gradients, clipping and update."""
from __future__ import annotations

from typing import Any

import numpy as np
from mindformers import MFTrainOneStepCell
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Tensor, nn, ops

from mindrlhf import cli
from mindrlhf.models.glm4.network import pick
from mindrlhf.records import PLACE
from mindrlhf.runtime import SumOverWorkers, unwrap_network

add_gradients = ops.MultitypeFuncGraph("add_gradients")


@add_gradients.register("Tensor", "Tensor")
def _add(left: Tensor, right: Tensor) -> Tensor:
    return left + right


scale = ops.MultitypeFuncGraph("scale")


@scale.register("Tensor", "Tensor")
def _scale(factor: Tensor, gradient: Tensor) -> Tensor:
    return gradient * factor.astype(gradient.dtype)


class ClipInPlan(nn.Cell):
    """MindFormers' ClipGradNorm for accumulated gradients of a sharded plan.

    MindSpore sums squares over cards if a norm directly follows a gradient, but it does not see
    through the addition of accumulated gradients. All parts of a gradient have the same size, and
    each part is on the same number of cards. So the mean square of the full gradient is the mean
    over the cards of the mean squares of their parts.

    Args:
        max_norm: gradients are scaled down to this global norm.
        weights: the parameters, not sharded yet, in the order of their gradients.
        cards: number of cards.
    """

    def __init__(self, max_norm: float, weights: Any, cards: int) -> None:
        super().__init__(auto_prefix=False)
        self.max_norm, self.cards = max_norm, cards
        self.sizes = tuple(float(weight.size) for weight in weights)
        self.zero = Tensor(np.zeros(1, np.float32))  # one dimension, as MindFormers' norm has
        self.mean, self.all_reduce = ops.ReduceMean(), ops.AllReduce()
        self.hyper_map = ops.HyperMap()

    def construct(self, gradients: tuple) -> tuple:
        """Gradients -> (clipped gradients, float32 (1,): norm before clipping)."""
        squares = self.zero
        for number, size in enumerate(self.sizes):
            squares += size * self.mean(ops.square(gradients[number].astype("float32")), ())
        norm = ops.sqrt(self.all_reduce(squares) / self.cards)
        factor = self.max_norm / (ops.maximum(norm, self.max_norm) + 1e-6)
        return self.hyper_map(ops.Partial()(scale, factor), gradients), norm


class PartLoss(nn.Cell):
    """The function that is differentiated: the share of some rows in the loss of the global batch.

    Everything that reads the data is in this cell, after the split of a semi-auto parallel plan.
    MindSpore does not propagate layouts from a cell that calls value_and_grad into the
    differentiated function: data split outside of it would be full rows to some operators and a
    card's share to others, without an error.

    Args:
        network: Glm4DPO.
        split: splits a batch over the cards of a plan; None without one.
        sum_over_workers: sums a tensor over the data-parallel workers.
    """

    def __init__(self, network: nn.Cell, split: nn.Cell | None,
                 sum_over_workers: SumOverWorkers) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.split, self.sum_over_workers = network, split, sum_over_workers

    def construct(self, columns: tuple, all_chosen: Tensor, all_answer_tokens: Tensor) -> tuple:
        """The loss of some rows.

        Args:
            columns: of these rows, in the order of records.COLUMNS.
            all_chosen: int32 (rows, P), the column of all rows of the batch.
            all_answer_tokens: int32 (rows, A), the column of all rows of the batch.

        Returns:
            what Glm4DPO returns.
        """
        if self.split is not None:
            # no negative indices: MindSpore 2.7 finds no shape for them ("shape_ptr is nullptr")
            count, inputs = len(PLACE), self.split(*columns, all_chosen, all_answer_tokens)
            columns, all_chosen = inputs[:count], inputs[count]
            all_answer_tokens = inputs[count + 1]
        pairs = (all_chosen >= 0).astype("float32").sum()
        tokens = pick(all_answer_tokens.astype("float32"), all_chosen).sum()
        totals = self.sum_over_workers(ops.stack((pairs, tokens)))
        weights = ops.stop_gradient(self.sum_over_workers.factor / ops.maximum(totals, 1.0))
        return self.network(columns, weights.reshape((1, 2)))


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class DPOTrainOneStepCell(MFTrainOneStepCell):
    """A training step of Glm4DPO for MindFormers' Trainer.

    The loss is the mean over the pairs of the global batch: all workers, rows and accumulated
    parts. Overflow is detected from the gradients' norm and the batch's sums, not from the NPU's
    float status register as in MFTrainOneStepCell, so it works on every device. A step that
    overflows changes no weights. There is no loss scale: bfloat16 and float32 need none.

    Args:
        network: Glm4DPO, or a cell of MindFormers around it.
        optimizer: as MFTrainOneStepCell takes it.
        max_grad_norm: gradients are scaled down to this global norm.
        accumulation: number of parts into which the rows of a batch are split. Only one part's
            activations are in memory at a time.
        parallel_config: passed on to MFTrainOneStepCell.
    """

    def __init__(self, network: nn.Cell, optimizer: nn.Optimizer, max_grad_norm: float = 1.0,
                 accumulation: int = 1, parallel_config: Any = None) -> None:
        network, split = unwrap_network(network)
        super().__init__(network, optimizer, use_clip_grad=True, max_grad_norm=max_grad_norm,
                         parallel_config=parallel_config)
        self.accumulation = accumulation
        self.sum_over_workers = SumOverWorkers()
        self.part_loss = PartLoss(network, split, self.sum_over_workers)
        if split is not None and accumulation > 1:
            self.clip_grad_norm = ClipInPlan(max_grad_norm, self.weights, cli.workers())

    def part(self, columns: tuple, number: int) -> tuple:
        """The columns of one of the parts into which the rows are split."""
        size = columns[PLACE["pair_ids"]].shape[0] // self.accumulation
        rows = ()
        for column in columns:
            rows += (column[number * size:(number + 1) * size],)  # type: ignore[assignment]
        return rows

    def construct(self, *columns: Tensor) -> tuple:
        """Columns of a batch, in the order of COLUMNS -> the fields of records.StepOutput."""
        # one function for all parts: with one each, MindSpore 2.7 loses the earlier parts' values
        forward_backward = ops.value_and_grad(self.part_loss, None, self.weights, has_aux=True)
        chosen, answer_tokens = columns[PLACE["chosen"]], columns[PLACE["answer_tokens"]]
        (loss, sums, faulty), gradients = forward_backward(
            self.part(columns, 0), chosen, answer_tokens)
        for number in range(1, self.accumulation):
            # the next part waits for the gradients: one part's activations at a time
            later = (ops.depend(columns[0], gradients),) + columns[1:]
            values, more = forward_backward(self.part(later, number), chosen, answer_tokens)
            gradients = self.hyper_map(add_gradients, gradients, more)
            loss, sums = loss + values[0], sums + values[1]
            faulty = ops.concat((faulty, values[2]))
        gradients = self.grad_reducer(gradients)
        gradients, norm = self.clip_grad_norm(gradients)
        sums = self.sum_over_workers(sums)
        finite = ops.logical_and(ops.isfinite(norm).all(), ops.isfinite(sums).all())
        overflow = ops.logical_not(finite)
        learning_rate = self.learning_rate
        if self.optimizer.dynamic_lr:
            learning_rate = self.learning_rate(self.optimizer.global_step).reshape(())
        if not overflow:
            loss = ops.depend(loss, self.optimizer(gradients))
        return (loss, overflow, self.scale_sense, learning_rate, norm, sums,
                columns[PLACE["pair_ids"]], faulty)
