"""What one does with a trained model: ask it."""
