"""A DPO training run around MindFormers' Trainer: step, metrics, evaluation, states, journal."""
