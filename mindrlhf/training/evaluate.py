"""Metrics of a data set under the current weights."""
from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor, float32, nn

from mindrlhf import metrics, runtime
from mindrlhf.records import SUMS


class EvaluationStep(nn.Cell):
    """Glm4DPO as a function from a batch's columns to its sums.

    Args:
        network: Glm4DPO.
    """

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.weights = Tensor(np.ones((1, 2)), float32)  # weights of the loss, which is not read

    def construct(self, *columns: Tensor) -> Tensor:
        """Columns in the order of records.COLUMNS -> float32 (len(SUMS),)."""
        _, sums, _ = self.network(columns, self.weights)
        return sums


class Evaluator:
    """Runs the model over every batch of a data set. It changes no weights and drops no pairs.

    Args:
        network: Glm4DPO.
        dataset: a MindSpore dataset from data.dataset.open_dataset.
        sft_weight: weight of the SFT term in the loss.
    """

    def __init__(self, network: nn.Cell, dataset: Any, sft_weight: float) -> None:
        self.network, self.dataset, self.sft_weight = network, dataset, sft_weight
        self.step = runtime.evaluation_network(EvaluationStep(network))
        self.sum_over_workers = runtime.SumOverWorkers()

    def __call__(self) -> dict[str, float]:
        """Metrics of all pairs, named as in compute_metrics. The network ends in training mode."""
        self.network.set_train(False)
        total = np.zeros(len(SUMS))
        for batch in self.dataset.create_tuple_iterator(num_epochs=1):
            total += self.step(*batch).asnumpy()
        self.network.set_train(True)
        total = self.sum_over_workers(Tensor(total, dtype=float32)).asnumpy()
        return metrics.compute_metrics(total, sft_weight=self.sft_weight)
