"""Write case_1/gradients.safetensors: PyTorch's gradients of the DPO loss on the golden case.

PyTorch is no dependency of the project. Use a separate environment; the file was made with these
versions:

    python -m venv scratch
    scratch/bin/pip install torch==2.13.0 transformers==5.23.0 numpy safetensors
    scratch/bin/python tests/golden/make_gradients.py

Each answer is scored alone, without padding or packing, by transformers' GlmForCausalLM in float64.
The loss is the mean over the 8 pairs of -log sigmoid(0.1 (chosen log-ratio - rejected log-ratio)),
with log-probs summed over the answer. Each pair's references differ from the policy by OFFSETS, so
that no pair has the weight 1/2 of step 0. Tensors of the file, float32, named as in case_1/hf_glm:
    chosen_ref_logps, rejected_ref_logps (8,)   the references, nats
    losses (2,)                                 the DPO loss; the SFT loss, which is the negative
                                                log-likelihood per chosen token
    dpo/NAME                                    gradient of the DPO loss
    sft/NAME                                    every 8th row of the gradient of the SFT loss
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

CASE = Path(__file__).parent / "case_1"
BETA = 0.1
OFFSETS = {"chosen": (-6, 3, -2, 5, 1, -4, 7, 2), "rejected": (4, -5, 1, -1, 8, 3, -6, -3)}  # nats


def answer_logp(model, prompt, answer):
    """Log-probability of an answer after its prompt, summed over the answer's tokens. Both are
    lists of token ids.
    """
    ids = torch.tensor([prompt + answer])
    logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(prompt) - 1 :].sum()


def main():
    """Compute and write; ends with an error where log-probs are not those of expected.json."""
    pairs = json.loads((CASE / "expected.json").read_text())["pairs"]
    model = AutoModelForCausalLM.from_pretrained(
        CASE / "hf_glm", dtype=torch.float64, attn_implementation="eager"
    )
    logps, references = {}, {}
    for side, offsets in OFFSETS.items():
        logps[side] = torch.stack(
            [answer_logp(model, pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs]
        )
        same = torch.tensor([pair[f"ref_{side}_logps"] for pair in pairs], dtype=torch.float64)
        assert (logps[side] - same).abs().max() < 1e-4, side
        references[side] = same + torch.tensor(offsets)
    margins = BETA * (
        (logps["chosen"] - references["chosen"]) - (logps["rejected"] - references["rejected"])
    )
    dpo = -torch.nn.functional.logsigmoid(margins).mean()
    sft = -logps["chosen"].sum() / sum(len(pair["chosen_ids"]) for pair in pairs)
    names, weights = zip(*model.named_parameters(), strict=True)
    tensors = {f"{side}_ref_logps": reference for side, reference in references.items()}
    tensors["losses"] = torch.stack((dpo, sft)).detach()
    for name, gradient in zip(
        names, torch.autograd.grad(dpo, weights, retain_graph=True), strict=True
    ):
        tensors[f"dpo/{name}"] = gradient
    for name, gradient in zip(names, torch.autograd.grad(sft, weights), strict=True):
        tensors[f"sft/{name}"] = gradient[::8]
    save_file(
        {name: tensor.float().contiguous() for name, tensor in tensors.items()},
        CASE / "gradients.safetensors",
    )
    print(
        f"{len(tensors)} tensors, DPO loss {dpo.item():.6f}, SFT loss {sft.item():.6f}, "
        f"margins {[round(margin, 4) for margin in margins.tolist()]}"
    )


if __name__ == "__main__":
    main()
