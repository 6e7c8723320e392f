"""Rules of a KV cache: tokens kept in full precision, the time at which the others are encoded, and eviction."""
