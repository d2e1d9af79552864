"""Training over any decoder: steps, data, checkpoints. Needs the `train` extra."""
