"""Saving and loading of packed caches."""
