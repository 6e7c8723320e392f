"""What a model is made of: attention layers found by structure, hooks on their sites, rotary embeddings."""
