"""Model structure: attention layers found by a probe, hooks on their sites, rotary embeddings, fingerprints."""
