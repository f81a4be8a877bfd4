"""Sizes and constants of a GLM-4: from a Hugging Face config.json, or from a YAML."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindrlhf.cli import UserError

THETA = 10000  # base of the rotary embedding at rope_ratio 1
# the fields of ModelConfig that shapes depend on
SIZES = ("num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size",
         "num_attention_heads", "multi_query_group_num", "kv_channels")
MODEL_TYPES = ("glm", "chatglm")
MOST_LAYERS = 1000  # a larger number means a damaged file, and would take forever to compare
# field of ModelConfig -> keys of config.json, the `glm` spelling first
KEYS = {
    "num_layers": ("num_hidden_layers", "num_layers"),
    "padded_vocab_size": ("padded_vocab_size", "vocab_size"),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("intermediate_size", "ffn_hidden_size"),
    "num_attention_heads": ("num_attention_heads",),
    "multi_query_group_num": ("num_key_value_heads", "multi_query_group_num"),
    "kv_channels": ("head_dim", "kv_channels"),
    "layernorm_epsilon": ("rms_norm_eps", "layernorm_epsilon"),
    "eos_token_id": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
    "max_position_embeddings": ("max_position_embeddings", "seq_length"),
}
OPTIONAL = ("max_position_embeddings",)
# properties of GLM-4; a config.json with another value describes another model
FIXED = {
    "hidden_act": "silu",
    "rmsnorm": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "attention_bias": True,
    "multi_query_attention": True,
    "post_layer_norm": True,
    "original_rope": True,
    "apply_residual_connection_post_layernorm": False,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a GLM-4, named as in MindFormers' ChatGLM2Config.

    Attributes:
        inv_freq: what the source stored as weight_names.INV_FREQ, so that conversion back restores
            it. The model computes its own.
    """
    num_layers: int
    padded_vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    multi_query_group_num: int
    kv_channels: int
    layernorm_epsilon: float
    rope_ratio: float
    eos_token_id: tuple[int, ...]
    pad_token_id: int
    max_position_embeddings: int = 131072
    inv_freq: tuple[float, ...] = ()

    @classmethod
    def of(cls, settings: dict[str, Any]) -> ModelConfig:
        """The sizes in a YAML; fields that no shape depends on are zero.

        Args:
            settings: as config.load_settings returns them.
        """
        model = settings["model"]["model_config"]
        return cls(**{name: model[name] for name in SIZES}, layernorm_epsilon=0.0, rope_ratio=0,
                   eos_token_id=(), pad_token_id=0)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the query, key and value parts of query_key_value."""
        group = self.multi_query_group_num * self.kv_channels
        return self.num_attention_heads * self.kv_channels, group, group


def is_valid(field: str, value: Any) -> bool:
    """Whether a field of ModelConfig may have this value."""
    if field in ("eos_token_id", "inv_freq"):
        kind = int if field == "eos_token_id" else float
        return isinstance(value, tuple) and all(
            type(number) is kind and number >= 0 for number in value)
    if field == "pad_token_id":
        return type(value) is int and value >= 0
    if field == "layernorm_epsilon":
        return type(value) is float and 0 < value < 1
    if field == "rope_ratio":
        return type(value) in (int, float) and 0 < value < 1e12
    return type(value) is int and 0 < value < (MOST_LAYERS if field == "num_layers" else 1 << 32)


def parse_hf_config(config: Mapping[str, Any], place: str | Path) -> ModelConfig:
    """The sizes and constants in a config.json of either spelling.

    Args:
        config: the parsed file.
        place: its path, for messages.

    Raises:
        UserError: a key is missing or invalid, or belongs to another model. The message lists all
            such keys.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field, keys in KEYS.items():
        found = {key: config[key] for key in keys if config.get(key) is not None}
        if not found:
            if field not in OPTIONAL:
                problems.append(f"{' or '.join(keys)} is missing")
            continue
        key, value = next(iter(found.items()))
        if field == "eos_token_id":
            value = tuple(value) if isinstance(value, list) else (value,)
        if not is_valid(field, value):
            problems.append(f"{key} is {config[key]!r}")
        elif field != "padded_vocab_size" and any(other != config[key] for other in found.values()):
            problems.append(" but ".join(f"{key} is {other!r}" for key, other in found.items()))
        values[field] = value
    values["rope_ratio"] = _rope_ratio(config, problems)
    if config.get("model_type", "glm") not in MODEL_TYPES:
        problems.append(f"model_type is {config['model_type']!r}, GLM-4 has "
                        f"{' or '.join(MODEL_TYPES)}")
    if not problems and values["num_attention_heads"] % values["multi_query_group_num"]:
        problems.append(f"{values['num_attention_heads']} attention heads are no multiple of "
                        f"{values['multi_query_group_num']} key-value heads")
    if problems:
        raise UserError(f"{place}: not a GLM-4 that can be converted: {'; '.join(problems)}")
    return ModelConfig(**values)


def _rope_ratio(config: Mapping[str, Any], problems: list[str]) -> float:
    """The factor of THETA, from rope_ratio, rope_theta, rope_parameters or rope_scaling.

    Args:
        config: the parsed config.json.
        problems: what is wrong with the file; more is appended.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        problems.append(f"rope_parameters is {rope!r}")
        rope = {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"rope_type is {kind!r}, GLM-4 has 'default'")
    for key, value in FIXED.items():
        found = rope.get(key, config.get(key, value))
        if found != value or type(found) is not type(value):
            problems.append(f"{key} is {found!r}, GLM-4 has {value!r}")
    given = {"rope_parameters.rope_theta": rope.get("rope_theta"),
             "rope_theta": config.get("rope_theta"),
             "rope_ratio": config.get("rope_ratio")}
    ratios: dict[str, float] = {}
    for key, value in given.items():
        if value is None:
            continue
        if not is_valid("rope_ratio", value):
            problems.append(f"{key} is {value!r}")
        else:
            ratios[key] = value if key == "rope_ratio" else value / THETA
    if len(set(ratios.values())) > 1:
        problems.append(" but ".join(f"{key} is {given[key]!r}" for key in ratios))
    ratio = next(iter(ratios.values()), 1)
    return int(ratio) if ratio == int(ratio) else ratio
