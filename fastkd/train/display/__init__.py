"""What a person sees of a training run: console, curves, TensorBoard."""
