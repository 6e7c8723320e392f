"""KIVI under the names that its users know."""
