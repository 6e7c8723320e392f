"""A transformers cache that keeps codes, and what it keeps of each layer, sequence and site."""
