"""TRL's side of end_to_end.py, which starts it: DPOTrainer on token ids, with times on one line.

python end_to_end_trl.py MODEL_FOLDER TOKEN_IDS BATCH THREADS
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GlmForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer


class TokenizedTrainer(DPOTrainer):
    """DPOTrainer on a data set that has its token ids already; counts the positions it computes."""

    computed = batches = 0

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        """Count the positions of a batch, padding included."""
        self.computed += inputs["input_ids"].numel()
        self.batches += 1
        return super().training_step(model, inputs, *rest)


def main() -> None:
    """Score, train, and print seconds and positions."""
    folder, ids, batch, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    begin = time.perf_counter()
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    with open(ids, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    dataset = Dataset.from_list([{name: row[name] for name in names} for row in rows])
    model = GlmForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 256}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<pad>",
    )
    config = DPOConfig(
        output_dir="trl",
        per_device_train_batch_size=int(batch),
        num_train_epochs=1,
        learning_rate=1e-6,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=int(batch),
        max_length=None,
        gradient_checkpointing=False,  # recomputes; memory is no concern here
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
    )
    trainer = TokenizedTrainer(
        model=model, args=config, train_dataset=dataset, processing_class=tokenizer
    )
    trainer.get_train_dataloader()  # precomputes the reference log-probs, unless done
    ready = time.perf_counter()
    trainer.train()
    print()
    print(
        json.dumps(
            {
                "reference": ready - begin,
                "training": time.perf_counter() - ready,
                "computed": trainer.computed,
                "batches": trainer.batches,
            }
        )
    )


if __name__ == "__main__":
    main()
