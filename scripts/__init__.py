"""The programs `calibrate`, `evaluate` and `artifact`."""
