"""Any cache object with quantizers in front of it."""
