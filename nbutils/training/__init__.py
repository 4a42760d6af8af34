"""One run: its settings, the network, the training script."""
