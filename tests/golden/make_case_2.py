"""Write case_2: PyTorch's results on a tiny GLM-4 with GLM-4-9B's head size.

The head size is 128, which flash attention supports. In the environment of make_gradients.py:

    scratch/bin/python tests/golden/make_case_2.py

The pairs, their token ids and the tokenizer are those of case_1. Weights are random bfloat16
numbers, large enough for attention to be far from uniform. Each answer is scored alone, without
padding or packing, by transformers' GlmForCausalLM in float64. case_2/expected.json has, for the 8
pairs in order:
    chosen_logps, rejected_logps            log-probs of the answers, nats
    chosen_references, rejected_references  the same plus make_gradients.OFFSETS
    loss                                    mean DPO loss (beta 0.1) of the policy with these
                                            references
    grad_norm                               norm of its gradient with respect to all parameters
"""

import json

import torch
from make_gradients import BETA, CASE, OFFSETS, answer_logp
from transformers import GlmConfig, GlmForCausalLM

TARGET = CASE.parent / "case_2"


def make_model():
    """A GLM-4 of two layers with bfloat16 numbers, computing in float64."""
    config = GlmConfig(
        vocab_size=330,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
        rms_norm_eps=1.5625e-07,
        max_position_embeddings=1024,
        pad_token_id=316,
        eos_token_id=[316, 323, 325],
        bos_token_id=None,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    )
    model, generator = GlmForCausalLM(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale, start = (
                (0.1, 1.0)
                if "norm" in name
                else (0.1, 0.0)
                if name.endswith("bias")
                else (0.2, 0.0)
            )
            weight.copy_(start + scale * torch.randn(weight.shape, generator=generator))
    model.to(torch.bfloat16).save_pretrained(
        TARGET / "hf_glm"
    )  # which rounds the rotary embedding's buffer too: read it
    return GlmForCausalLM.from_pretrained(
        TARGET / "hf_glm", dtype=torch.float64, attn_implementation="eager"
    )


def main():
    pairs = json.loads((CASE / "expected.json").read_text())["pairs"]
    model, logps, references = make_model(), {}, {}
    for side, offsets in OFFSETS.items():
        logps[side] = torch.stack(
            [answer_logp(model, pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs]
        )
        references[side] = logps[side].detach() + torch.tensor(offsets)
    margins = BETA * (
        (logps["chosen"] - references["chosen"]) - (logps["rejected"] - references["rejected"])
    )
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = {
        **{f"{side}_logps": value.tolist() for side, value in logps.items()},
        **{f"{side}_references": value.tolist() for side, value in references.items()},
        "loss": loss.item(),
        "grad_norm": torch.stack([gradient.norm() for gradient in gradients]).norm().item(),
    }
    (TARGET / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(
        f"loss {expected['loss']:.6f}, norm {expected['grad_norm']:.6f}, "
        f"log-probs {expected['chosen_logps']}"
    )


if __name__ == "__main__":
    main()
