"""One training step."""
import numpy as np
from mindformers import MFTrainOneStepCell
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Tensor, nn, ops

from mindrlhf import cli
from mindrlhf.records import PLACE
from mindrlhf.runtime import SumOverWorkers, unwrap_network

add_gradients = ops.MultitypeFuncGraph("add_gradients")


@add_gradients.register("Tensor", "Tensor")
def _add(left, right):
    return left + right


scale = ops.MultitypeFuncGraph("scale")


@scale.register("Tensor", "Tensor")
def _scale(factor, gradient):
    return gradient * factor.astype(gradient.dtype)


class ClipInPlan(nn.Cell):
    """MindFormers' ClipGradNorm for gradients that a plan spreads over cards, and that were added up.

    MindSpore adds up the squares of all cards where it finds a norm behind a gradient, but it does not look through an
    addition. The cards' parts of a gradient are of one size, and each stands on as many cards; so the mean of the squares
    of the whole is the mean over the cards of the means of their parts.

    Args:
        max_norm: as ClipGradNorm takes it.
        weights: parameters, not sharded yet, whose gradients come.
        cards: number of cards.
    """

    def __init__(self, max_norm, weights, cards):
        super().__init__(auto_prefix=False)
        self.max_norm, self.cards = max_norm, cards
        self.sizes = tuple(float(weight.size) for weight in weights)
        self.zero = Tensor(np.zeros(1, np.float32))  # of one dimension, as MindFormers has it
        self.mean, self.all_reduce, self.hyper_map = ops.ReduceMean(), ops.AllReduce(), ops.HyperMap()

    def construct(self, gradients):
        """Tuple of gradients -> (clipped ones, norm before, float32 (1,))."""
        squares = self.zero
        for number, size in enumerate(self.sizes):
            squares += size * self.mean(ops.square(gradients[number].astype("float32")), ())
        norm = ops.sqrt(self.all_reduce(squares) / self.cards)
        factor = self.max_norm / (ops.maximum(norm, self.max_norm) + 1e-6)
        return self.hyper_map(ops.Partial()(scale, factor), gradients), norm


class PartLoss(nn.Cell):
    """What is differentiated: the loss of a part of the rows, as its share in that of the global batch.

    Whatever reads the data stands in here, behind the split of a semi-auto parallel plan. MindSpore does not follow
    layouts from a cell that calls value_and_grad into the function that is differentiated: data that were split outside
    would be whole rows to some operators and a card's share to others, without an error.

    Args:
        network: Glm4DPO.
        split: Cell that splits a batch over the cards of a plan, or None.
        sum_over_workers: SumOverWorkers.
    """

    def __init__(self, network, split, sum_over_workers):
        super().__init__(auto_prefix=False)
        self.network, self.split, self.sum_over_workers = network, split, sum_over_workers

    def construct(self, columns, all_pair_ids, all_chosen_loss_mask):
        """
        Args:
            columns: tuple of the part's columns, in the order of records.COLUMNS.
            all_pair_ids, all_chosen_loss_mask: those two columns of the whole batch.

        Returns:
            what Glm4DPO returns.
        """
        if self.split is not None:
            inputs = self.split(*columns, all_pair_ids, all_chosen_loss_mask)
            columns, all_pair_ids, all_chosen_loss_mask = inputs[:-2], inputs[-2], inputs[-1]
        pairs = (all_pair_ids >= 0).astype("float32").sum()
        tokens = all_chosen_loss_mask.astype("float32").sum()
        totals = self.sum_over_workers(ops.stack((pairs, tokens)))
        weights = ops.stop_gradient(self.sum_over_workers.factor / ops.maximum(totals, 1.0))
        return self.network(columns, weights.reshape((1, 2)))


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class DPOTrainOneStepCell(MFTrainOneStepCell):
    """A step of Glm4DPO, for MindFormers' Trainer.

    The loss is the mean over the pairs of the global batch: all workers, all rows, all accumulated parts. Overflow is
    read off the norm of the gradients, not off the NPU's float status register as in MFTrainOneStepCell, so it works on
    every device; a step that overflows changes no weight. There is no loss scale: bfloat16 and float32 need none.

    Args:
        network: Glm4DPO, or it in a cell that MindFormers puts around it.
        optimizer: as MFTrainOneStepCell takes it.
        max_grad_norm: gradients are scaled down to this global norm.
        accumulation: parts into which the rows of a batch are split; one part is in memory at a time.
        parallel_config: MindFormers passes it on.
    """

    def __init__(self, network, optimizer, max_grad_norm=1.0, accumulation=1, parallel_config=None):
        network, split = unwrap_network(network)
        super().__init__(network, optimizer, use_clip_grad=True, max_grad_norm=max_grad_norm,
                         parallel_config=parallel_config)
        self.accumulation = accumulation
        self.sum_over_workers = SumOverWorkers()
        self.part_loss = PartLoss(network, split, self.sum_over_workers)
        if split is not None and accumulation > 1:
            self.clip_grad_norm = ClipInPlan(max_grad_norm, self.weights, cli.workers())

    def part(self, columns, number):
        """The columns of one part of the rows."""
        size = columns[PLACE["pair_ids"]].shape[0] // self.accumulation
        rows = ()
        for column in columns:
            rows += (column[number * size:(number + 1) * size],)
        return rows

    def construct(self, *columns):
        """Columns of a batch, in the order of records.COLUMNS -> the fields of records.StepOutput, in order."""
        # one function for all parts: MindSpore 2.7 loses the values of the earlier ones when each makes its own
        forward_backward = ops.value_and_grad(self.part_loss, None, self.weights, has_aux=True)
        pair_ids, chosen_loss_mask = columns[PLACE["pair_ids"]], columns[PLACE["chosen_loss_mask"]]
        (loss, sums, faulty), gradients = forward_backward(self.part(columns, 0), pair_ids, chosen_loss_mask)
        for number in range(1, self.accumulation):
            later = (ops.depend(columns[0], gradients),) + columns[1:]  # one part's activations at a time
            values, more = forward_backward(self.part(later, number), pair_ids, chosen_loss_mask)
            gradients = self.hyper_map(add_gradients, gradients, more)
            loss, sums, faulty = loss + values[0], sums + values[1], ops.concat((faulty, values[2]))
        gradients = self.grad_reducer(gradients)
        gradients, norm = self.clip_grad_norm(gradients)
        overflow = ops.logical_not(ops.isfinite(norm)).all()
        learning_rate = self.learning_rate
        if self.optimizer.dynamic_lr:
            learning_rate = self.learning_rate(self.optimizer.global_step).reshape(())
        if not overflow:
            loss = ops.depend(loss, self.optimizer(gradients))
        return loss, overflow, self.scale_sense, learning_rate, norm, self.sum_over_workers(sums), pair_ids, faulty
