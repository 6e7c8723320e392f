"""Runs behind `calibrate` and `evaluate`: gathering, texts, tasks, the harness."""
