"""recompute_config.recompute: how many layers compute their activations a second time."""
from __future__ import annotations

from typing import Any

from mindrlhf.parallel import Settings


def recomputed_layers(settings: Settings) -> int:
    """Number of layers that are recomputed in the backward pass: always the first ones."""
    layers = settings["model"]["model_config"]["num_layers"]
    value = (settings.get("recompute_config") or {}).get("recompute", False)
    if isinstance(value, list):
        (value,) = value
    if isinstance(value, bool):
        return layers if value else 0
    return min(value, layers)


def recompute_for_mindformers(value: Any) -> Any:
    """The value in a form that MindFormers accepts.

    Its LayerSetting takes True, False, or a list with a number of layers for each pipeline stage,
    of which there is one here; for single operators also a list of their patterns, or pattern ->
    such a value. It rejects a plain number, and changes a list in place.
    """
    if isinstance(value, dict):
        return {name: recompute_for_mindformers(each) for name, each in value.items()}
    if isinstance(value, list):
        return list(value)
    return value if isinstance(value, bool) else [value]
