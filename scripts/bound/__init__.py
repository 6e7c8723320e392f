"""Recipes beside the rate-distortion limit of what they code."""
