"""Training and measuring the bundled model."""
