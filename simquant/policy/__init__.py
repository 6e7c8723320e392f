"""What a cache keeps in full precision, when it encodes, and what it evicts."""
