"""The best setting under a bit budget, by search."""
