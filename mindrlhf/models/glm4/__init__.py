"""GLM-4: chat template, tokenizer, weight names and the DPO network."""
