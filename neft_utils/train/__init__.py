"""One run: weights, tokens, losses, the trainer and its log."""
