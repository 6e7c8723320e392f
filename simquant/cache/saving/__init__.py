"""Packed caches in files."""
