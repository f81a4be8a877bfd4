"""One training step."""
from mindformers import MFTrainOneStepCell
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import ops


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class DPOTrainOneStepCell(MFTrainOneStepCell):
    """A step of a network that returns (loss, sums), for MindFormers' Trainer.

    Differs from its parent in what it needs from the device: overflow is read off the norm of the gradients, not off
    the NPU's float status register, so it runs on every device. There is no loss scale: bfloat16 and float32 need none.

    Args:
        network, optimizer: as MFTrainOneStepCell takes them.
        max_grad_norm: gradients are scaled down to this global norm.
        parallel_config: MindFormers passes it on.
    """

    def __init__(self, network, optimizer, max_grad_norm=1.0, parallel_config=None):
        super().__init__(network, optimizer, use_clip_grad=True, max_grad_norm=max_grad_norm,
                         parallel_config=parallel_config)

    def construct(self, *columns):
        """Columns of a batch -> (loss, overflow, loss scale, learning rate, gradient norm before clipping, sums)."""
        (loss, sums), gradients = ops.value_and_grad(self.network, None, self.weights, has_aux=True)(*columns)
        gradients = self.grad_reducer(gradients)
        gradients, norm = self.clip_grad_norm(gradients)
        overflow = ops.logical_not(ops.isfinite(norm)).all()
        learning_rate = self.learning_rate
        if self.optimizer.dynamic_lr:
            learning_rate = self.learning_rate(self.optimizer.global_step).reshape(())
        if not overflow:
            loss = ops.depend(loss, self.optimizer(gradients))
        return loss, overflow, self.scale_sense, learning_rate, norm, sums
