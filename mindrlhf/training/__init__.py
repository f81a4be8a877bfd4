"""What the training loop of MindFormers lacks: DPO metrics, checks and evaluation."""
