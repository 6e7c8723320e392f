"""What a report finds out by running the model."""
