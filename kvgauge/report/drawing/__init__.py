"""Plots and markup of a report's page."""
