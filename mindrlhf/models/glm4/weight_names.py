"""Names and shapes of GLM-4's weights, in MindFormers' ChatGLM2 and in both spellings of Hugging Face.

`glm` is the spelling of transformers' GlmForCausalLM (glm-4-9b-chat-hf), `chatglm` that of the original
repositories (glm-4-9b, glm-4-9b-chat, glm-4-9b-chat-1m), which MindFormers follows but for one name.
"""
import re
from dataclasses import dataclass

from mindrlhf.cli import UserError

EMBEDDING = "transformer.embedding.embedding_weight"
CACHES = (".key_cache", ".value_cache")  # of prediction with use_past: Parameters, but no weights
LAYER = re.compile(r"transformer\.encoder\.layers\.(\d+)\.")
DERIVED = "transformer.rotary_pos_emb.inv_freq"  # stored by the original repositories, computed by the model


def is_cache(name):
    """Whether a parameter holds keys or values of earlier tokens, which no checkpoint has."""
    return name.endswith(CACHES)


@dataclass(frozen=True)
class Numbers:
    """The sizes and constants of a GLM-4, named as MindFormers' ChatGLM2Config names them.

    inv_freq: what the source stored under DERIVED, so that it can be given back; the model computes its own.
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
    eos_token_id: tuple
    pad_token_id: int
    max_position_embeddings: int = 131072
    inv_freq: tuple = ()

    @property
    def qkv_sizes(self):
        """Rows of the query, key and value parts of query_key_value."""
        group = self.multi_query_group_num * self.kv_channels
        return self.num_attention_heads * self.kv_channels, group, group


# field of Numbers -> keys of config.json, the `glm` spelling first
KEYS = {"num_layers": ("num_hidden_layers", "num_layers"),
        "padded_vocab_size": ("padded_vocab_size", "vocab_size"),
        "hidden_size": ("hidden_size",), "ffn_hidden_size": ("intermediate_size", "ffn_hidden_size"),
        "num_attention_heads": ("num_attention_heads",),
        "multi_query_group_num": ("num_key_value_heads", "multi_query_group_num"),
        "kv_channels": ("head_dim", "kv_channels"),
        "layernorm_epsilon": ("rms_norm_eps", "layernorm_epsilon"),
        "eos_token_id": ("eos_token_id",), "pad_token_id": ("pad_token_id",),
        "max_position_embeddings": ("max_position_embeddings", "seq_length")}
OPTIONAL = ("max_position_embeddings",)
# what this code computes; a config.json that says otherwise is another model
FIXED = {"hidden_act": "silu", "rmsnorm": True, "add_bias_linear": False, "add_qkv_bias": True,
         "attention_bias": True, "multi_query_attention": True, "post_layer_norm": True,
         "original_rope": True, "apply_residual_connection_post_layernorm": False,
         "partial_rotary_factor": 0.5, "tie_word_embeddings": False}
MODEL_TYPES = ("glm", "chatglm")
MOST_LAYERS = 1000  # more is damage, and would take for ever to compare
THETA = 10000  # base of the rotary embedding at rope_ratio 1


def fits(field, value):
    """Whether a field of Numbers may hold this value."""
    if field in ("eos_token_id", "inv_freq"):
        kind = int if field == "eos_token_id" else float
        return isinstance(value, tuple) and all(type(number) is kind and number >= 0 for number in value)
    if field == "pad_token_id":
        return type(value) is int and value >= 0
    if field == "layernorm_epsilon":
        return type(value) is float and 0 < value < 1
    if field == "rope_ratio":
        return type(value) in (int, float) and 0 < value < 1e12
    return type(value) is int and 0 < value < (MOST_LAYERS if field == "num_layers" else 1 << 32)


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
        found = {key: config[key] for key in keys if config.get(key) is not None}
        if not found:
            if field not in OPTIONAL:
                problems.append(f"{' or '.join(keys)} is missing")
            continue
        key, value = next(iter(found.items()))
        if field == "eos_token_id":
            value = tuple(value) if isinstance(value, list) else (value,)
        if not fits(field, value):
            problems.append(f"{key} is {config[key]!r}")
        elif field != "padded_vocab_size" and any(other != config[key] for other in found.values()):
            problems.append(" but ".join(f"{key} is {other!r}" for key, other in found.items()))
        values[field] = value
    values["rope_ratio"] = _rope_ratio(config, problems)
    if config.get("model_type", "glm") not in MODEL_TYPES:
        problems.append(f"model_type is {config['model_type']!r}, GLM-4 has {' or '.join(MODEL_TYPES)}")
    if not problems and values["num_attention_heads"] % values["multi_query_group_num"]:
        problems.append(f"{values['num_attention_heads']} attention heads are no multiple of "
                        f"{values['multi_query_group_num']} key-value heads")
    if problems:
        raise UserError(f"{place}: not a GLM-4 that can be converted: {'; '.join(problems)}")
    return Numbers(**values)


def _rope_ratio(config, problems):
    """The factor on THETA, from any spelling of it: rope_ratio, rope_theta, rope_parameters, rope_scaling."""
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
    given = {"rope_parameters.rope_theta": rope.get("rope_theta"), "rope_theta": config.get("rope_theta"),
             "rope_ratio": config.get("rope_ratio")}
    ratios = {}
    for key, value in given.items():
        if value is None:
            continue
        if not fits("rope_ratio", value):
            problems.append(f"{key} is {value!r}")
        else:
            ratios[key] = value if key == "rope_ratio" else value / THETA
    if len(set(ratios.values())) > 1:
        problems.append(" but ".join(f"{key} is {given[key]!r}" for key in ratios))
    ratio = next(iter(ratios.values()), 1)
    return int(ratio) if ratio == int(ratio) else ratio


def measure(found):
    """What whole tensors tell of the numbers.

    Args:
        found: dict, name -> shape, of a checkpoint.

    Returns:
        dict, a field of Numbers or a product of two -> int; empty where the tensors are not a GLM-4's.
    """
    first = "transformer.encoder.layers.0."
    names = (EMBEDDING, first + "self_attention.dense.weight", first + "mlp.dense_4h_to_h.weight",
             first + "self_attention.query_key_value.weight")
    if not all(len(found.get(name, ())) == 2 for name in names):
        return {}
    (vocabulary, hidden), (_, heads), (_, ffn), (qkv, _) = (found[name] for name in names)
    layers = {match[1] for name in found if (match := LAYER.match(name))}
    return {"num_layers": len(layers), "padded_vocab_size": vocabulary, "hidden_size": hidden,
            "ffn_hidden_size": ffn, "num_attention_heads * kv_channels": heads,
            "multi_query_group_num * kv_channels": (qkv - heads) // 2}


def shapes(numbers):
    """Name -> shape of every parameter of MindFormers' ChatGLM2 with these numbers."""
    hidden, qkv = numbers.hidden_size, sum(numbers.qkv_sizes)
    table = {EMBEDDING: (numbers.padded_vocab_size, hidden)}
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


_GLM = {"embedding.embedding_weight": "model.embed_tokens.weight",
        "encoder.final_layernorm.weight": "model.norm.weight", "output_layer.weight": "lm_head.weight"}
_GLM_LAYER = {"self_attention.dense.weight": "self_attn.o_proj.weight",
              "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
              "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight"}


def hf_parts(name, numbers, layout):
    """The Hugging Face tensors that make one MindFormers parameter.

    Args:
        name: a key of shapes(numbers).
        numbers: Numbers.
        layout: "glm" or "chatglm".

    Returns:
        list of (tensor name, rows): joined along axis 0 they are the parameter; rows is None for only one.
    """
    short = name.removeprefix("transformer.")
    if layout == "chatglm":
        return [("transformer.embedding.word_embeddings.weight" if name == EMBEDDING else name, None)]
    if short in _GLM:
        return [(_GLM[short], None)]
    _, _, layer, rest = short.split(".", 3)
    prefix = f"model.layers.{layer}."
    if "query_key_value" in rest:
        kind = rest.rsplit(".", 1)[1]
        return [(f"{prefix}self_attn.{part}_proj.{kind}", rows)
                for part, rows in zip("qkv", numbers.qkv_sizes)]
    return [(prefix + _GLM_LAYER.get(rest, rest), None)]


def hf_shapes(numbers, layout):
    """Name -> shape of every tensor of a Hugging Face checkpoint in one spelling, in order of shapes()."""
    return {part: shape if rows is None else (rows, *shape[1:])
            for name, shape in shapes(numbers).items() for part, rows in hf_parts(name, numbers, layout)}
