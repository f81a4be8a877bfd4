"""Names and shapes of GLM-4's weights, in MindFormers' ChatGLM2 and in both Hugging Face layouts.

`glm` is the layout of transformers' GlmForCausalLM (glm-4-9b-chat-hf). `chatglm` is that of the
original repositories (glm-4-9b, glm-4-9b-chat, glm-4-9b-chat-1m), whose names MindFormers uses for
all weights but the embedding.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mindrlhf.models.glm4.model_config import ModelConfig

PREFIX = "transformer."  # of every weight; a training state also has the optimizer's names
LAYERS = "transformer.encoder.layers."
EMBEDDING = "transformer.embedding.embedding_weight"
CHATGLM_EMBEDDING = "transformer.embedding.word_embeddings.weight"
OUTPUT = "transformer.output_layer.weight"
# the original repositories store it; the model computes it
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
# suffixes of Parameters that prediction with use_past has and no checkpoint holds
KEY_VALUE_CACHES = (".key_cache", ".value_cache")
# suffixes of an adapter's two matrices
LORA_A, LORA_B = ".mindpet_delta_lora_a", ".mindpet_delta_lora_b"


class Weight(NamedTuple):
    """A weight, or the weight of this kind in every layer.

    Attributes:
        name: in MindFormers; {layer} is the number of the layer.
        glm: names in GlmForCausalLM; the weight is these tensors joined along axis 0.
        shape: names of its dimensions, see dimensions().
    """
    name: str
    glm: tuple[str, ...]
    shape: tuple[str, ...]


_L, _H = LAYERS + "{layer}.", "model.layers.{layer}."
BEFORE_LAYERS = (
    Weight(EMBEDDING, ("model.embed_tokens.weight",), ("vocabulary", "hidden")),)
IN_LAYERS = (
    Weight(_L + "input_layernorm.weight",
           (_H + "input_layernorm.weight",),
           ("hidden",)),
    Weight(_L + "self_attention.query_key_value.weight",
           (_H + "self_attn.q_proj.weight",
            _H + "self_attn.k_proj.weight",
            _H + "self_attn.v_proj.weight"),
           ("query_key_value", "hidden")),
    Weight(_L + "self_attention.query_key_value.bias",
           (_H + "self_attn.q_proj.bias",
            _H + "self_attn.k_proj.bias",
            _H + "self_attn.v_proj.bias"),
           ("query_key_value",)),
    Weight(_L + "self_attention.dense.weight",
           (_H + "self_attn.o_proj.weight",),
           ("hidden", "query")),
    Weight(_L + "post_attention_layernorm.weight",
           (_H + "post_attention_layernorm.weight",),
           ("hidden",)),
    Weight(_L + "mlp.dense_h_to_4h.weight",
           (_H + "mlp.gate_up_proj.weight",),
           ("gate_up", "hidden")),
    Weight(_L + "mlp.dense_4h_to_h.weight",
           (_H + "mlp.down_proj.weight",),
           ("hidden", "feed_forward")))
AFTER_LAYERS = (
    Weight("transformer.encoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
    Weight(OUTPUT, ("lm_head.weight",), ("vocabulary", "hidden")))


def dimensions(config: ModelConfig) -> dict[str, int]:
    """Sizes of the dimensions that Weight.shape names."""
    query, key, value = config.qkv_sizes
    return {"vocabulary": config.padded_vocab_size,
            "hidden": config.hidden_size,
            "query": query,
            "query_key_value": query + key + value,
            "gate_up": 2 * config.ffn_hidden_size,
            "feed_forward": config.ffn_hidden_size}


def all_weights(config: ModelConfig) -> Iterator[Weight]:
    """Every weight of a model, in MindFormers' order, with the layer's number filled in."""
    yield from BEFORE_LAYERS
    for layer in range(config.num_layers):
        for weight in IN_LAYERS:
            yield Weight(weight.name.format(layer=layer),
                         tuple(name.format(layer=layer) for name in weight.glm), weight.shape)
    yield from AFTER_LAYERS


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of MindFormers' ChatGLM2, without adapters and caches."""
    sizes = dimensions(config)
    return {weight.name: tuple(sizes[name] for name in weight.shape)
            for weight in all_weights(config)}


class HfPart(NamedTuple):
    """A Hugging Face tensor that is a MindFormers parameter, or some rows of one."""
    name: str
    shape: tuple[int, ...]


def hf_parts(config: ModelConfig, layout: str) -> dict[str, list[HfPart]]:
    """MindFormers' name -> the Hugging Face tensors that, joined along axis 0, are the parameter.

    Args:
        config: sizes of the model.
        layout: "glm" or "chatglm".
    """
    parts = {}
    for weight, shape in zip(all_weights(config), parameter_shapes(config).values()):
        if layout == "chatglm":
            name = CHATGLM_EMBEDDING if weight.name == EMBEDDING else weight.name
            parts[weight.name] = [HfPart(name, shape)]
        else:
            rows = config.qkv_sizes if len(weight.glm) == 3 else shape[:1]
            parts[weight.name] = [HfPart(name, (count, *shape[1:]))
                                  for name, count in zip(weight.glm, rows)]
    return parts


def hf_shapes(config: ModelConfig, layout: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a Hugging Face checkpoint, in MindFormers' order."""
    return {part.name: part.shape for parts in hf_parts(config, layout).values() for part in parts}


def measure_shapes(found: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of a model, from the shapes of its unsharded weights.

    Args:
        found: name -> shape, of a checkpoint.

    Returns:
        field of ModelConfig, or product of two -> size; empty if the tensors are not a GLM-4's.
    """
    first = LAYERS + "0."
    names = (EMBEDDING, first + "self_attention.dense.weight", first + "mlp.dense_4h_to_h.weight",
             first + "self_attention.query_key_value.weight")
    if not all(len(found.get(name, ())) == 2 for name in names):
        return {}
    (vocabulary, hidden), (_, heads), (_, ffn), (qkv, _) = (found[name] for name in names)
    pattern = re.compile(re.escape(LAYERS) + r"(\d+)\.")
    layers = {match[1] for name in found if (match := pattern.match(name))}
    return {"num_layers": len(layers),
            "padded_vocab_size": vocabulary,
            "hidden_size": hidden,
            "ffn_hidden_size": ffn,
            "num_attention_heads * kv_channels": heads,
            "multi_query_group_num * kv_channels": (qkv - heads) // 2}


def is_weight(name: str) -> bool:
    """Whether a name in a checkpoint or strategy belongs to a weight or an adapter."""
    return name.startswith(PREFIX)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter."""
    return name.endswith((LORA_A, LORA_B))


def is_adapter_weight(name: str) -> bool:
    """Whether a name is an adapter's matrix, and not an optimizer's moment of one."""
    return is_weight(name) and is_adapter(name)


def is_base_weight(name: str) -> bool:
    """Whether a parameter is a weight of the model, and not of an adapter."""
    return is_weight(name) and not is_adapter(name)


def is_cache(name: str) -> bool:
    """Whether a parameter is a key-value cache, which no checkpoint holds."""
    return name.endswith(KEY_VALUE_CACHES)
