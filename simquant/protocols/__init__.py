"""The protocols full, decode and cache: what each query of a scored window sees."""
