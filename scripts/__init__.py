"""Programs that are run from a checkout and not installed: benchmarks, the demo model's training, results."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from types import ModuleType

MOVED = {
    "scripts.ablate": "kvgauge.cli.ablate",
    "scripts.bench_cache": "scripts.bench.cache",
    "scripts.bench_calibrate": "scripts.bench.calibrate",
    "scripts.bench_fit": "scripts.bench.fit",
    "scripts.bench_saved_cache": "scripts.bench.saved_cache",
    "scripts.bench_simulate": "scripts.bench.simulate",
    "scripts.compare_recipes": "kvgauge.cli.compare",
    "scripts.demo": "kvgauge.cli.demo",
    "scripts.report": "kvgauge.cli.report",
    "scripts.sweep": "kvgauge.cli.sweep",
    "scripts.train_demo_model": "scripts.demo_model.train",
}
"""Programs that notes and papers still call by their first names, `python -m scripts.sweep`."""


class _Moved(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = find_spec(MOVED[name]) if name in MOVED else None
        return found and spec_from_file_location(name, found.origin)


sys.meta_path.append(_Moved())
