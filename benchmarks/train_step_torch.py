"""PyTorch's side of train_step.py, which starts it: plain GLM-4, DPO loss and torch.optim.AdamW.

It prints one JSON line for each line on stdin; see train_step.serve.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from train_step import (
    ANSWER,
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
    make_pairs,
    make_weights,
    peak,
    serve,
    sizes,
)

HEADS, GROUPS, WIDTH = (
    SIZES[name] for name in ("num_attention_heads", "multi_query_group_num", "kv_channels")
)


Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # cosines, sines, causal mask


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm of (..., H)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first half of each head's channels.

    Args:
        x: (B, heads, S, D).
        cosine: (S, D / 4).
        sine: (S, D / 4).
    """
    turned, still = x.split(WIDTH // 2, -1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    turned = torch.stack((a * cosine - b * sine, b * cosine + a * sine), -1).flatten(-2)
    return torch.cat((turned, still), -1)


def attention(
    x: torch.Tensor, weights: dict[str, torch.nn.Parameter], prefix: str, tables: Tables
) -> torch.Tensor:
    """Causal self-attention, (B, S, H) -> (B, S, H). prefix: of the weights' names in one layer."""
    qkv = F.linear(
        x, weights[prefix + "query_key_value.weight"], weights[prefix + "query_key_value.bias"]
    )
    queries, keys, values = (
        part.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for part in qkv.split(sizes().qkv_sizes, -1)
    )
    queries, keys = rotate(queries, *tables[:2]), rotate(keys, *tables[:2])
    keys, values = (part.repeat_interleave(HEADS // GROUPS, 1) for part in (keys, values))
    context = (queries @ keys.transpose(-1, -2) / WIDTH**0.5 + tables[2]).softmax(-1) @ values
    return F.linear(context.transpose(1, 2).flatten(-2), weights[prefix + "dense.weight"])


def token_logps(
    ids: torch.Tensor, labels: torch.Tensor, weights: dict[str, torch.nn.Parameter], tables: Tables
) -> torch.Tensor:
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


def main() -> None:
    """Build the model, then answer train_step.py."""
    torch.set_num_threads(THREADS)
    base = peak()
    weights = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in make_weights()}
    optimizer = torch.optim.AdamW(
        weights.values(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    pairs = make_pairs()
    tokens = torch.from_numpy(  # the chosen sequences first
        np.array([np.concatenate((pair[0], pair[side])) for side in (1, 2) for pair in pairs])
    )
    ids, labels, mask = tokens[:, :-1], tokens[:, 1:], torch.arange(LENGTH) >= PROMPT - 1
    theta = (10000.0 * ROPE_RATIO) ** (-torch.arange(0, WIDTH // 2, 2) / (WIDTH // 2))
    angles = torch.outer(torch.arange(LENGTH), theta)
    tables = angles.cos(), angles.sin(), torch.full((LENGTH, LENGTH), float("-inf")).triu(1)

    def step() -> float:
        logps = token_logps(ids, labels, weights, tables)
        chosen, rejected = (logps * mask).sum(1).split(ROWS)
        margins = BETA * ((chosen - REFERENCE) - (rejected - REFERENCE))
        loss = -F.logsigmoid(margins).mean() - SFT_WEIGHT * chosen.mean() / ANSWER
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), MAX_NORM)
        optimizer.step()
        return loss.item()

    serve({"step": step}, base)


if __name__ == "__main__":
    main()
