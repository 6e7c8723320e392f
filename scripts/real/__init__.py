"""Claims of the documentation, checked on a real model."""
