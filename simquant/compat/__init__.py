"""Other systems under the names that their users know: KIVI, SCOPE, fake-quantized caches."""
