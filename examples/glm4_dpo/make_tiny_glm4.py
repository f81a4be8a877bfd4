"""A tiny GLM-4 with random weights, its tokenizer and harmless sample pairs: all that a rehearsal on a CPU needs.

The files are of the kinds that a user of GLM-4-9B has: a Hugging Face folder (config.json, safetensors, tokenizer.model)
and pairs with the fields of CValues-Comparison.
"""
import base64
import collections
import json
import sys
from pathlib import Path

import numpy as np
import regex

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mindrlhf import cli, config, files
from mindrlhf.checkpoints import containers
from mindrlhf.models.glm4 import weight_names

EXAMPLE = "  python make_tiny_glm4.py --output_path tiny/"
SPECIAL_TOKENS = 14  # that ChatGLM4Tokenizer adds behind the vocabulary of the file
# how GLM-4's tokenizer splits text before it joins bytes
SPLIT = regex.compile(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                      r"|\s*[\r\n]+|\s+(?!\S)|\s+")

TOPICS = {"zh": ["跑步", "做饭", "画画", "游泳", "书法", "下棋", "种花", "摄影", "唱歌", "跳舞", "编程", "钓鱼", "骑车",
                 "写作", "瑜伽", "茶艺", "木工", "登山", "缝纫", "吉他"],
          "en": ["running", "cooking", "drawing", "swimming", "chess", "gardening", "singing", "dancing", "coding",
                 "fishing"]}
HELD_OUT = {"zh": 4, "en": 2}  # topics at the end of each list that training never sees
SENTENCES = {  # question, answer that helps, answer that does not
    "zh": [("怎么开始学{0}？", "可以先定一个小目标，每天练一点{0}，慢慢就会进步。", "{0}？别费劲了，反正你学不会。"),
           ("{0}太难了，我想放弃。", "遇到困难很正常，先休息一下，再请教懂{0}的朋友。", "那就放弃吧，{0}跟我有什么关系。"),
           ("有人笑我{0}不好，怎么办？", "别太在意，{0}是为了自己开心，进步需要时间。", "他们说得对，你的{0}就是很差。")],
    "en": [("How do I start {0}?", "Begin with a small goal and practise {0} a little every day.", "Don't bother with {0}."),
           ("I am bad at {0}.", "That is fine. Nobody starts well, and {0} takes time.", "Yes, you are. Stop {0}.")]}


def parser():
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--output_path", required=True, help="folder to write; hf/, train.jsonl and held_out.jsonl in it")
    parse.add_argument("--config", default=str(Path(__file__).with_name("glm4_tiny.yaml")),
                       help="YAML with the sizes of the model (default: glm4_tiny.yaml)")
    return parse


def make_pairs():
    """(training rows, held-out rows), dicts with the fields of CValues-Comparison; no topic is in both."""
    train, held_out = [], []
    for language, topics in TOPICS.items():
        for number, topic in enumerate(topics):
            rows = held_out if number >= len(topics) - HELD_OUT[language] else train
            for texts in SENTENCES[language]:
                rows.append(dict(zip(("prompt", "pos_resp", "neg_resp"), [text.format(topic) for text in texts])))
    return train, held_out


def train_tokenizer(text, size):
    """Byte pair encoding: list of tokens (bytes), the 256 bytes first, then the most frequent pairs one after another."""
    words = collections.Counter(tuple(bytes([byte]) for byte in word.encode()) for word in SPLIT.findall(text))
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < size:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best[0] + best[1])
        merged = collections.Counter()
        for word, count in words.items():
            merged[_join(word, best)] += count
        words = merged
    return tokens


def _join(word, pair):
    pieces, position = [], 0
    while position < len(word):
        step = 2 if word[position:position + 2] == pair else 1
        pieces.append(b"".join(word[position:position + step]))
        position += step
    return tuple(pieces)


def make_weights(numbers, seed=0):
    """Hugging Face tensors of a random GLM-4: dict, name -> float32 array. Matrices are N(0, 0.02), as GLM-4's start."""
    random = np.random.default_rng(seed)
    return {name: np.ones(shape, np.float32) if "norm" in name else np.zeros(shape, np.float32) if name.endswith("bias")
            else random.normal(0, 0.02, shape).astype(np.float32) for name, shape in weight_names.hf_shapes(numbers, "glm").items()}


def hf_config(numbers):
    """config.json of transformers' GlmForCausalLM."""
    return {"architectures": ["GlmForCausalLM"], "model_type": "glm", "dtype": "float32", "hidden_act": "silu",
            "attention_bias": True, "tie_word_embeddings": False, "num_hidden_layers": numbers.num_layers,
            "vocab_size": numbers.padded_vocab_size, "hidden_size": numbers.hidden_size,
            "intermediate_size": numbers.ffn_hidden_size, "num_attention_heads": numbers.num_attention_heads,
            "num_key_value_heads": numbers.multi_query_group_num, "head_dim": numbers.kv_channels,
            "rms_norm_eps": numbers.layernorm_epsilon, "pad_token_id": numbers.pad_token_id,
            "eos_token_id": list(numbers.eos_token_id), "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0 * numbers.rope_ratio,
                                "partial_rotary_factor": 0.5}}


def write_model(folder, numbers, tokens):
    """config.json, two shards with their index, tokenizer.model."""
    tensors = make_weights(numbers)
    names = list(tensors)
    index = {}
    for number, part in enumerate((names[:len(names) // 2], names[len(names) // 2:]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        containers.write(folder / shard, [(n, "F32", tensors[n].shape, lambda n=n: tensors[n]) for n in part])
        index |= dict.fromkeys(part, shard)
    files.write_json(folder / "model.safetensors.index.json",
                          {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": index})
    files.write_json(folder / "config.json", hf_config(numbers))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("".join(lines))


def main(argv=None):
    arguments = parser().parse_args(argv)
    folder = Path(arguments.output_path)
    settings = config.read(arguments.config)["model"]["model_config"]
    train, held_out = make_pairs()
    vocabulary = settings["padded_vocab_size"] - SPECIAL_TOKENS
    tokens = train_tokenizer("\n".join(text for row in train for text in row.values()), vocabulary)
    sizes = {key: settings[key] for key in weight_names.KEYS if key in settings}
    numbers = weight_names.Numbers(**sizes, rope_ratio=settings["rope_ratio"], pad_token_id=vocabulary,
                              eos_token_id=(vocabulary, vocabulary + 7, vocabulary + 9))
    write_model(folder / "hf", numbers, tokens)
    for name, rows in (("train", train), ("held_out", held_out)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    size = sum(int(np.prod(shape)) for shape in weight_names.shapes(numbers).values())
    print(f"{folder}: a GLM-4 of {size:,} parameters, {len(train)} training pairs, {len(held_out)} held-out pairs")


if __name__ == "__main__":
    cli.run(main)
