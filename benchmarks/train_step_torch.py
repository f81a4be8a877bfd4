"""PyTorch's side of train_step.py, which starts it: GLM-4 and the DPO loss written plainly, torch.optim.AdamW."""

import torch
import torch.nn.functional as F
from train_step import (
    BETA,
    EPS,
    LENGTH,
    MAX_NORM,
    PROMPT,
    RATE,
    REFERENCE,
    ROPE_RATIO,
    ROWS,
    SFT_WEIGHT,
    SIZES,
    THREADS,
    make_batch,
    make_weights,
    memory,
    numbers,
    serve,
)

HEADS, GROUPS, WIDTH = (
    SIZES[name] for name in ("num_attention_heads", "multi_query_group_num", "kv_channels")
)


def norm(x, weight):
    """RMSNorm of (..., H)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def rotate(x, cosine, sine):
    """Rotary embedding of the first half of each head's channels: x (B, heads, S, D), tables (S, D / 4)."""
    turned, still = x.split(WIDTH // 2, -1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    turned = torch.stack((a * cosine - b * sine, b * cosine + a * sine), -1).flatten(-2)
    return torch.cat((turned, still), -1)


def attention(x, weights, prefix, tables):
    """Causal self-attention, (B, S, H) -> (B, S, H)."""
    qkv = F.linear(
        x, weights[prefix + "query_key_value.weight"], weights[prefix + "query_key_value.bias"]
    )
    queries, keys, values = (
        part.unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        for part in qkv.split(numbers().qkv_sizes, -1)
    )
    queries, keys = rotate(queries, *tables[:2]), rotate(keys, *tables[:2])
    keys, values = (part.repeat_interleave(HEADS // GROUPS, 1) for part in (keys, values))
    context = (queries @ keys.transpose(-1, -2) / WIDTH**0.5 + tables[2]).softmax(-1) @ values
    return F.linear(context.transpose(1, 2).flatten(-2), weights[prefix + "dense.weight"])


def token_logps(ids, labels, weights, tables):
    """ids, labels (B, S) -> log-probs of the labels (B, S)."""
    x = weights["transformer.embedding.embedding_weight"][ids]
    for layer in range(SIZES["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        x = x + attention(
            norm(x, weights[prefix + "input_layernorm.weight"]),
            weights,
            prefix + "self_attention.",
            tables,
        )
        gate, up = F.linear(
            norm(x, weights[prefix + "post_attention_layernorm.weight"]),
            weights[prefix + "mlp.dense_h_to_4h.weight"],
        ).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, weights[prefix + "mlp.dense_4h_to_h.weight"])
    x = norm(x, weights["transformer.encoder.final_layernorm.weight"])
    logps = F.linear(x, weights["transformer.output_layer.weight"]).log_softmax(-1)
    return logps.gather(-1, labels[..., None].long())[..., 0]


def main():
    """Build, and take turns with the other side."""
    torch.set_num_threads(THREADS)
    base = memory()
    weights = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in make_weights()}
    optimizer = torch.optim.AdamW(
        weights.values(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    (ids, labels, mask, _), (other_ids, other_labels, _, _) = make_batch()
    ids, labels = (
        torch.from_numpy(np_pair) for np_pair in _joined((ids, labels), (other_ids, other_labels))
    )
    mask = torch.from_numpy(mask)
    theta = (10000.0 * ROPE_RATIO) ** (-torch.arange(0, WIDTH // 2, 2) / (WIDTH // 2))
    angles = torch.outer(torch.arange(LENGTH), theta)
    tables = angles.cos(), angles.sin(), torch.full((LENGTH, LENGTH), float("-inf")).triu(1)

    def step():
        logps = token_logps(ids, labels, weights, tables)
        chosen, rejected = (logps[:ROWS] * mask).sum(1), (logps[ROWS:] * mask).sum(1)
        margins = BETA * ((chosen - REFERENCE) - (rejected - REFERENCE))
        loss = -F.logsigmoid(margins).mean() - SFT_WEIGHT * chosen.mean() / (LENGTH - PROMPT)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), MAX_NORM)
        optimizer.step()
        return loss.item()

    serve({"step": step}, base)


def _joined(chosen, rejected):
    """Arrays of both sides, the chosen rows first."""
    import numpy as np

    return [np.concatenate(pair) for pair in zip(chosen, rejected, strict=True)]


if __name__ == "__main__":
    main()
