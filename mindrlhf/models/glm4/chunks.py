"""Log-probs of tokens chunk by chunk, where no gradient is wanted."""
import mindspore as ms
import numpy as np
from mindspore import nn, ops


class ChunkLoop(nn.Cell):
    """TokenLogps in a loop of the graph: the logits of one chunk are gone before those of the next come.

    An unrolled loop does not promise that. Nothing orders its chunks, and on the CPU MindSpore gives each memory of
    its own: 2048 positions of 151,552 ids need 8.4 GB at once, 7.4 GB unrolled in chunks of 256, 1.1 GB here.

    Args:
        token_logps: Cell, (hidden (N, H), labels (N,)) -> (N,).
        chunk_size: positions at once.
    """

    def __init__(self, token_logps, chunk_size):
        super().__init__(auto_prefix=False)
        self.token_logps, self.chunk_size = token_logps, chunk_size
        self.places = ms.Tensor(np.arange(chunk_size), ms.int32)
        self.start = ms.Tensor(0, ms.int32)  # a Tensor: the loop is not unrolled

    def construct(self, hidden, labels):
        """hidden (N, H), labels int32 (N,) -> log-probs float32 (N,)."""
        total = labels.shape[0]
        begin, logps = self.start, ops.zeros((total,), ms.float32)
        while begin < total:
            places = ops.minimum(self.places + begin, total - 1)  # the last chunk repeats the last position
            chunk = self.token_logps(ops.gather(hidden, places, 0), ops.gather(labels, places, 0))
            logps = ops.tensor_scatter_update(logps, places.expand_dims(1), chunk)
            begin = begin + self.chunk_size
        return logps


def loop_chunks(sequence_logps):
    """Let a SequenceLogps that works in chunks loop over them; for inference, and not for a parallel plan."""
    if sequence_logps.chunk_size:
        sequence_logps.token_logps = ChunkLoop(sequence_logps.token_logps, sequence_logps.chunk_size)
        sequence_logps.chunk_size = 0  # its own way, made for gradients, is off
