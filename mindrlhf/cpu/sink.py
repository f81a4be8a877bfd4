"""Sink mode on a CPU, with MindSpore's training loop for NPUs.

On an NPU, the data set is sent to the device in the background, and the training network is
wrapped in a cell that fetches its batches there. An "epoch" of MindSpore's loop is then one call of
that cell, which makes sink_size steps. MindSpore turns all this off on a CPU, so callbacks there
never see a wrapped network, or epochs that are steps. This module runs the NPU's loop,
Model._train_dataset_sink_process, with a wrapped network that fetches its batches in Python.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mindspore import nn
from mindspore.dataset import Dataset
from mindspore.train.model import Model


class SinkHelper:
    """The part of MindSpore's DatasetHelper that its loop uses in sink mode.

    Args:
        dataset: the training data, from its initial step on.
        sink_size: steps per call of the network.
        epochs: maximum number of passes over the data.
    """

    def __init__(self, dataset: Dataset, sink_size: int, epochs: int):
        self.size, self.batches = sink_size, dataset.create_tuple_iterator(num_epochs=epochs)

    def __iter__(self) -> Iterator[tuple]:
        """The inputs of one call of the network: none."""
        yield ()

    def sink_size(self) -> int:
        """Steps per call."""
        return self.size

    def next_batch(self) -> list:
        """The columns of the next batch; after the last batch, of the first one."""
        try:
            return next(self.batches)
        except StopIteration:
            return next(self.batches)

    def continue_send(self) -> None:
        """There is no data queue on a CPU."""

    def stop_send(self) -> None:
        """There is no data queue on a CPU."""

    def release(self) -> None:
        """There is no data queue on a CPU."""


class DataWrapper(nn.Cell):
    """The training network and its data, like MindSpore's _DataWrapper.

    Its only inner cell is `network`.

    Args:
        network: training step.
        helper: source of the batches.
    """

    def __init__(self, network: nn.Cell, helper: SinkHelper):
        super().__init__(auto_prefix=False)
        self.network, self.helper = network, helper

    def __call__(self) -> Any:
        """Make sink_size steps. Returns the outputs of the last one."""
        for _ in range(self.helper.size):
            outputs = self.network(*self.helper.next_batch())
        return outputs


def train_in_sink_mode(model: Model, epoch: int, train_dataset: Dataset, *arguments: Any,
                       dataset_sink_mode: bool = True, sink_size: int = -1, **options: Any) -> None:
    """Replacement for Model._train, with its arguments."""

    def prepare(*, is_train: bool, dataset: Dataset, dataset_sink_mode: bool, sink_size: int,
                epoch_num: int, dataset_helper: SinkHelper | None) -> tuple[SinkHelper, nn.Cell]:
        """Replacement for Model._exec_preprocess: (helper, wrapped network)."""
        if dataset_helper is None:
            dataset_helper = SinkHelper(dataset, sink_size, epoch_num)
            model.wrapped = DataWrapper(model._train_network, dataset_helper)
        model._backbone_is_train = is_train
        return dataset_helper, model.wrapped.set_train(is_train)

    def sink(epoch: int, dataset: Dataset, callbacks: Any, parameters: Any, initial_epoch: int,
             valid_infos: tuple) -> None:
        """Replacement for Model._train_process, which MindSpore calls on a CPU in every mode."""
        model._train_dataset_sink_process(epoch, dataset, callbacks, parameters, sink_size,
                                          initial_epoch, valid_infos)

    if dataset_sink_mode:
        model._exec_preprocess, model._train_process = prepare, sink
    ORIGINAL(model, epoch, train_dataset, *arguments, dataset_sink_mode=dataset_sink_mode,
             sink_size=sink_size, **options)


ORIGINAL = Model._train


def install() -> None:
    """Enable sink mode in this process."""
    Model._train = train_in_sink_mode
