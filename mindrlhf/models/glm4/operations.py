"""Floating-point operations of GLM-4, counted from the sizes of its matrices."""
from __future__ import annotations

from typing import Any, NamedTuple

from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.recompute import recomputed_layers


class Operations(NamedTuple):
    """Floating-point operations of a position in the forward pass."""
    layers: int
    output: int


def forward_operations(settings: dict[str, Any]) -> Operations:
    """Operations of a position in the forward pass.

    A matrix product takes two for each weight. Attention covers all positions of the row: flash
    attention computes masked positions too.
    """
    sizes = ModelConfig.of(settings)
    hidden, ffn, (query, key, _) = sizes.hidden_size, sizes.ffn_hidden_size, sizes.qkv_sizes
    matrices = hidden * (query + 2 * key) + query * hidden + 3 * hidden * ffn
    attention = 4 * settings["model"]["model_config"]["seq_length"] * query
    return Operations(sizes.num_layers * (2 * matrices + attention),
                      2 * hidden * sizes.padded_vocab_size)


def step_operations(settings: dict[str, Any], recomputed: float | None = None) -> float:
    """Operations of a position in a training step: forward, twice that backward, recomputation.

    Args:
        settings: as config.load_settings returns them.
        recomputed: share of the layers that are recomputed; None: as in the YAML.
    """
    operations = forward_operations(settings)
    if recomputed is None:
        recomputed = recomputed_layers(settings) / ModelConfig.of(settings).num_layers
    again = 1 if settings["dpo"]["logps_chunk_size"] else 0
    return (operations.layers * (1 + _backward(settings) + recomputed)
            + operations.output * (1 + _backward(settings) + again))


def model_operations(settings: dict[str, Any]) -> float:
    """Operations of a position in a training step without recomputation, as MFU counts them."""
    return sum(forward_operations(settings)) * (1 + _backward(settings))


def _backward(settings: dict[str, Any]) -> int:
    """Products of the backward pass for each of the forward pass."""
    return 1 if "lora" in settings else 2  # frozen matrices need no gradient
