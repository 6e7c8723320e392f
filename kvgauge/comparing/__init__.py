"""Recipes side by side, and ablations of one recipe."""
