"""Reading what other tools wrote: files of KVQuant, LLaMA3-simquant and msModelSlim become artifacts.

Nothing in a foreign file is ever executed. What a file does not say is said by `Hints` or assumed, and every
assumption is named in the notices that come with the artifact.
"""

from artifacts.importers.foreign import Opened, open_foreign
from artifacts.importers.hints import Hints

__all__ = ["Hints", "Opened", "open_foreign"]
