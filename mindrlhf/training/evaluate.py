"""Metrics of a data set under the model as it is."""
import numpy as np
from mindspore import Tensor, float32, nn

from mindrlhf import runtime
from mindrlhf.records import SUMS
from mindrlhf.training import metrics


class EvaluationStep(nn.Cell):
    """Glm4DPO as a function of a batch's columns that returns its sums.

    Args:
        network: Glm4DPO.
    """

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network
        self.weights = Tensor(np.ones((1, 2)), float32)  # of the loss, which nobody reads

    def construct(self, *columns):
        """Columns in the order of records.COLUMNS -> float32 (len(SUMS),)."""
        _, sums, _ = self.network(columns, self.weights)
        return sums


class Evaluator:
    """Runs the model over all batches of a data set; no weight changes, and no pair is left out.

    Args:
        network: Glm4DPO.
        dataset: as dataset.open_dataset gives it.
        sft_weight: weight of the SFT term in the loss.
    """

    def __init__(self, network, dataset, sft_weight):
        self.network, self.dataset, self.sft_weight = network, dataset, sft_weight
        self.step = runtime.evaluation_network(EvaluationStep(network))
        self.sum_over_workers = runtime.SumOverWorkers()

    def __call__(self):
        """Metrics over the whole set, as metrics.means gives them. The network is in training mode afterwards."""
        self.network.set_train(False)
        total = np.zeros(len(SUMS))
        for batch in self.dataset.create_tuple_iterator(num_epochs=1):
            total += self.step(*batch).asnumpy()
        self.network.set_train(True)
        total = self.sum_over_workers(Tensor(total, dtype=float32)).asnumpy()
        return metrics.compute_metrics(total, sft_weight=self.sft_weight)
