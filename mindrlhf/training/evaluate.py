"""Metrics of a data set under the model as it is."""
import numpy as np

from mindrlhf.training import metrics


def evaluate(network, dataset, *, sft_weight):
    """Run the model over all batches; no weight changes and no pair is left out.

    Args:
        network: Glm4DPO. It is in training mode again afterwards.
        dataset: as dataset.open_dataset gives it.
        sft_weight: weight of the SFT term in the loss.

    Returns:
        dict as metrics.means gives it.
    """
    network.set_train(False)
    total = np.zeros(len(metrics.SUMS))
    for batch in dataset.create_tuple_iterator(num_epochs=1):
        total += network(*batch)[1].asnumpy()
    network.set_train(True)
    return metrics.means(total, sft_weight=sft_weight)
