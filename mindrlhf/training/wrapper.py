"""One training step."""
from mindformers import MFTrainOneStepCell
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import ops

from mindrlhf.backend import SumOverWorkers, unwrap
from mindrlhf.data.mindrecord import COLUMNS

PAIR_IDS, CHOSEN_LOSS_MASK = (list(COLUMNS).index(name) for name in ("pair_ids", "chosen_loss_mask"))

add_gradients = ops.MultitypeFuncGraph("add_gradients")


@add_gradients.register("Tensor", "Tensor")
def _add(left, right):
    return left + right


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
        network, split = unwrap(network)
        super().__init__(network, optimizer, use_clip_grad=True, max_grad_norm=max_grad_norm,
                         parallel_config=parallel_config)
        self.accumulation, self.split = accumulation, split
        self.sum_over_workers = SumOverWorkers()
        self.replicas = self.sum_over_workers.replicas

    def loss_weights(self, columns):
        """float32 (rows, 2): 1 / pairs and 1 / chosen tokens of the global batch, times the number of workers, whose
        gradients MindSpore averages."""
        pairs = (columns[PAIR_IDS] >= 0).astype("float32").sum()
        tokens = columns[CHOSEN_LOSS_MASK].astype("float32").sum()
        totals = self.sum_over_workers(ops.stack((pairs, tokens)))
        weights = self.replicas / ops.maximum(totals, 1.0)
        return ops.tile(weights.reshape((1, 2)), (columns[PAIR_IDS].shape[0], 1))

    def part(self, columns, number):
        """One part of the rows."""
        size = columns[PAIR_IDS].shape[0] // self.accumulation
        rows = ()
        for column in columns:
            rows += (column[number * size:(number + 1) * size],)
        return rows if self.split is None else self.split(*rows)

    def construct(self, *columns):
        """Columns of a batch -> (loss, overflow, loss scale, learning rate, gradient norm before clipping, sums over the
        global batch, pair_ids (rows, P), finite bool (rows, P): whether each pair's loss is a number)."""
        inputs = columns + (self.loss_weights(columns),)
        # one function for all parts: MindSpore 2.7 loses the values of the earlier ones when each makes its own
        forward_backward = ops.value_and_grad(self.network, None, self.weights, has_aux=True)
        (loss, sums, finite), gradients = forward_backward(*self.part(inputs, 0))
        for number in range(1, self.accumulation):
            later = (ops.depend(inputs[0], gradients),) + inputs[1:]  # one part's activations at a time
            values, more = forward_backward(*self.part(later, number))
            gradients = self.hyper_map(add_gradients, gradients, more)
            loss, sums, finite = loss + values[0], sums + values[1], ops.concat((finite, values[2]))
        gradients = self.grad_reducer(gradients)
        gradients, norm = self.clip_grad_norm(gradients)
        overflow = ops.logical_not(ops.isfinite(norm)).all()
        learning_rate = self.learning_rate
        if self.optimizer.dynamic_lr:
            learning_rate = self.learning_rate(self.optimizer.global_step).reshape(())
        if not overflow:
            loss = ops.depend(loss, self.optimizer(gradients))
        return (loss, overflow, self.scale_sense, learning_rate, norm, self.sum_over_workers(sums), columns[PAIR_IDS],
                finite)
