"""Configurations of a run: frozen dataclasses whose fields carry the names of the options.

They import nothing of kvgauge but `kvgauge.terminal`; all other rooms take them instead of parsed arguments.
"""
