"""Interfaces of other systems under their own names: KIVI, SCOPE, fake-quantized caches."""
