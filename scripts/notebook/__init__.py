"""What the notebooks compute and draw."""
