"""Three ways to run a model on a quantized cache, and the figures of each."""
