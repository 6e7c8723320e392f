"""What `calibrate` and `evaluate` run."""
