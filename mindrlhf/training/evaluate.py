"""Metrics of a data set under the model as it is."""
import numpy as np
from mindspore import Tensor

from mindrlhf import runtime
from mindrlhf.training import metrics


class Evaluator:
    """Runs the model over all batches of a data set; no weight changes, and no pair is left out.

    Args:
        network: Glm4DPO.
        dataset: as dataset.open_dataset gives it.
        sft_weight: weight of the SFT term in the loss.
    """

    def __init__(self, network, dataset, sft_weight):
        self.network, self.dataset, self.sft_weight = network, dataset, sft_weight
        self.callable = runtime.evaluation_network(network)
        self.sum_over_workers = runtime.SumOverWorkers()

    def __call__(self):
        """Metrics over the whole set, as metrics.means gives them. The network is in training mode afterwards."""
        self.network.set_train(False)
        total = np.zeros(len(metrics.SUMS))
        for batch in self.dataset.create_tuple_iterator(num_epochs=1):
            weights = Tensor(np.ones((batch[0].shape[0], 2), np.float32))
            total += self.callable(*batch, weights)[1].asnumpy()
        self.network.set_train(True)
        total = self.sum_over_workers(Tensor(total, dtype=batch[4].dtype)).asnumpy()
        return metrics.means(total, sft_weight=self.sft_weight)
