"""Fits from statistics to an artifact: single sites, chains of predicted sites, bit allocation over sites."""
