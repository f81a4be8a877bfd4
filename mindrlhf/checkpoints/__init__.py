"""Checkpoint files: containers, tensors, shards of several cards, and strict loading.

How a checkpoint is read:

1. `containers` opens a .ckpt or .safetensors file and finds the position of each tensor.
2. `tensors` reads values from the file on request, piece by piece, and converts their dtype.
3. `runs` picks a training step that is intact on every rank; `layouts` reads from the strategy file
   which block of each tensor a card holds; `shards` presents the blocks as unsharded tensors.
4. `strict` loads the tensors into a network if all names and shapes match; `slices` lets each card
   of a parallel plan read only its own part.

`fingerprints` identifies a set of weights, and `reshard` converts between parallel plans.
"""
