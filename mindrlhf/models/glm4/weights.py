"""Names and shapes of GLM-4's weights, in MindFormers' ChatGLM2 and in both spellings of Hugging Face.

`glm` is the spelling of transformers' GlmForCausalLM (glm-4-9b-chat-hf), `chatglm` that of the original repositories
(glm-4-9b, glm-4-9b-chat, glm-4-9b-chat-1m), which MindFormers follows but for one name.
"""
from dataclasses import dataclass

from mindrlhf.cli import UserError

DERIVED = "transformer.rotary_pos_emb.inv_freq"  # stored by the original repositories, computed by the model


@dataclass(frozen=True)
class Numbers:
    """The sizes and constants of a GLM-4, named as MindFormers' ChatGLM2Config names them."""
    num_layers: int
    padded_vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    multi_query_group_num: int
    kv_channels: int
    layernorm_epsilon: float
    rope_ratio: float
    eos_token_id: tuple
    pad_token_id: int

    @property
    def qkv_sizes(self):
        """Rows of the query, key and value parts of query_key_value."""
        group = self.multi_query_group_num * self.kv_channels
        return self.num_attention_heads * self.kv_channels, group, group


# field of Numbers -> keys of config.json, the `glm` spelling first
KEYS = {"num_layers": ("num_hidden_layers", "num_layers"), "padded_vocab_size": ("padded_vocab_size", "vocab_size"),
        "hidden_size": ("hidden_size",), "ffn_hidden_size": ("intermediate_size", "ffn_hidden_size"),
        "num_attention_heads": ("num_attention_heads",),
        "multi_query_group_num": ("num_key_value_heads", "multi_query_group_num"),
        "kv_channels": ("head_dim", "kv_channels"), "layernorm_epsilon": ("rms_norm_eps", "layernorm_epsilon"),
        "eos_token_id": ("eos_token_id",), "pad_token_id": ("pad_token_id",)}
# what this code computes; a config.json that says otherwise is another model
FIXED = {"hidden_act": "silu", "rmsnorm": True, "add_bias_linear": False, "add_qkv_bias": True, "attention_bias": True,
         "multi_query_attention": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False,
         "original_rope": True, "partial_rotary_factor": 0.5, "tie_word_embeddings": False}


def read_numbers(config, place):
    """The numbers in a config.json of either spelling.

    Args:
        config: dict, the parsed file.
        place: its path, for messages.

    Raises:
        UserError: listing every key that is missing, odd, or belongs to another model.
    """
    values, problems = {}, []
    for field, keys in KEYS.items():
        key = next((key for key in keys if config.get(key) is not None), None)
        if key is None:
            problems.append(f"{' or '.join(keys)} is missing")
            continue
        values[field] = config[key]
        wanted = float if field == "layernorm_epsilon" else int
        numbers = values[field] if field == "eos_token_id" and isinstance(values[field], list) else [values[field]]
        if not all(type(number) in (int, wanted) and number >= 0 for number in numbers):
            problems.append(f"{key} is {values[field]!r}")
        if field == "eos_token_id":
            values[field] = tuple(numbers)
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    values["rope_ratio"] = config.get("rope_ratio", theta / 10000 if isinstance(theta, (int, float)) else 1)
    if not isinstance(values["rope_ratio"], (int, float)) or values["rope_ratio"] <= 0:
        problems.append(f"rope_ratio is {values['rope_ratio']!r}")
    elif values["rope_ratio"] == int(values["rope_ratio"]):
        values["rope_ratio"] = int(values["rope_ratio"])
    for key, value in FIXED.items():
        found = rope.get(key, config.get(key, value))
        if found != value:
            problems.append(f"{key} is {found!r}, GLM-4 has {value!r}")
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_type is {rope['rope_type']!r}, GLM-4 has 'default'")
    if problems:
        raise UserError(f"{place}: not a GLM-4 that can be converted: {'; '.join(problems)}")
    return Numbers(**values)


def shapes(numbers):
    """Name -> shape of every parameter of MindFormers' ChatGLM2 with these numbers."""
    hidden, qkv = numbers.hidden_size, sum(numbers.qkv_sizes)
    table = {"transformer.embedding.embedding_weight": (numbers.padded_vocab_size, hidden)}
    for layer in range(numbers.num_layers):
        prefix = f"transformer.encoder.layers.{layer}."
        table |= {prefix + "input_layernorm.weight": (hidden,),
                  prefix + "self_attention.query_key_value.weight": (qkv, hidden),
                  prefix + "self_attention.query_key_value.bias": (qkv,),
                  prefix + "self_attention.dense.weight": (hidden, numbers.qkv_sizes[0]),
                  prefix + "post_attention_layernorm.weight": (hidden,),
                  prefix + "mlp.dense_h_to_4h.weight": (2 * numbers.ffn_hidden_size, hidden),
                  prefix + "mlp.dense_4h_to_h.weight": (hidden, numbers.ffn_hidden_size)}
    return table | {"transformer.encoder.final_layernorm.weight": (hidden,),
                    "transformer.output_layer.weight": (numbers.padded_vocab_size, hidden)}


_GLM = {"embedding.embedding_weight": "model.embed_tokens.weight", "encoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight"}
_GLM_LAYER = {"self_attention.dense.weight": "self_attn.o_proj.weight", "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
              "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight"}


def hf_parts(name, numbers, layout):
    """The Hugging Face tensors that make one MindFormers parameter.

    Args:
        name: a key of shapes(numbers).
        numbers: Numbers.
        layout: "glm" or "chatglm".

    Returns:
        list of (tensor name, rows): joined along axis 0 they are the parameter; rows is None for a single one.
    """
    short = name.removeprefix("transformer.")
    if layout == "chatglm":
        return [("transformer.embedding.word_embeddings.weight" if short in _GLM and "embedding" in short else name, None)]
    if short in _GLM:
        return [(_GLM[short], None)]
    _, _, layer, rest = short.split(".", 3)
    prefix = f"model.layers.{layer}."
    if "query_key_value" in rest:
        kind = rest.rsplit(".", 1)[1]
        return [(f"{prefix}self_attn.{part}_proj.{kind}", rows) for part, rows in zip("qkv", numbers.qkv_sizes)]
    return [(prefix + _GLM_LAYER.get(rest, rest), None)]


def hf_shapes(numbers, layout):
    """Name -> shape of every tensor of a Hugging Face checkpoint in one spelling, in the order of shapes()."""
    return {part: shape if rows is None else (rows, *shape[1:])
            for name, shape in shapes(numbers).items() for part, rows in hf_parts(name, numbers, layout)}
