"""Importers: files of KVQuant, LLaMA3-simquant and msModelSlim as artifacts.

Nothing in a foreign file is ever executed. Settings that a file lacks come from `Hints` or are assumed, and a notice
names every assumption.
"""

from artifacts.importers.foreign import Opened, open_foreign
from artifacts.importers.hints import Hints

__all__ = ["Hints", "Opened", "open_foreign"]
