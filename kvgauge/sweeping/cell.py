"""One cell of a sweep: a recipe on a model for a task; and the file that keeps what it gave."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.manifest import tool_version
from artifacts.storage import canonical_json
from calib.recipe.recipe import Recipe
from kvgauge.configuration.model import short_name
from kvgauge.configuration.tasks import PERPLEXITY
from kvgauge.sweeping.settings import Settings
from kvgauge.terminal.console import say
from kvgauge.terminal.outputs import replace_text


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A recipe on a model for a task.

    Parameters
    ----------
    model : str
        Folder, GGUF file, hub id, `demo` or another known name.
    recipe : Recipe
        What is fitted.
    task : str
        One of `kvgauge.sweeping.tasks.TASKS`.
    settings : Settings
        Of calibration and evaluation.
    first_window : int
        Windows of the text before it are left out.
    """

    model: str
    recipe: Recipe
    task: str
    settings: Settings
    first_window: int = 0

    def identity(self) -> dict[str, Any]:
        """All that the result depends on: the same identity, the same result."""
        config = self.settings.evaluation(self.model)
        of_tasks = {name for name in Settings.model_fields if name.startswith("task_")}
        sources = {self.model, config.text.source, self.settings.calibration_source(self.model)}
        if self.task != PERPLEXITY:
            sources |= {str(path) for path in (config.tasks.task_data, config.tasks.task_prompts) if path}
        return {
            "model": self.model,
            "recipe": self.recipe.model_dump(mode="json"),
            "task": self.task,
            "settings": self.settings.model_dump(mode="json", exclude=of_tasks if self.task == PERPLEXITY else None),
            "first_window": self.first_window,
            "sources": {name: stamp(name) for name in sorted(sources)},
            "tool_version": tool_version(),
        }

    @property
    def name(self) -> str:
        """A name for its file: for people, and different for every identity."""
        return digest_name(self.identity(), self.model, self.recipe.name, self.task)


def stamp(source: str) -> str | None:
    """A digest of the names, sizes and times of a file or of a folder's files; None for what is no path here."""
    path = Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    # Sizes and times instead of contents: to hash a checkpoint takes longer than many cells do.
    rows = [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return digest(rows)[:16] if rows else None


def digest(value: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_name(identity: Any, model: str, *words: str) -> str:
    """Words that tell a file's content, and a digest that makes it the only one of its name."""
    # File systems take names of 255 bytes; the digest tells apart what was cut off.
    return f"{readable('-'.join([short_name(model), *words]))[:100]}-{digest(identity)[:12]}"


def readable(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^\w.=]+", "-", text).strip("-.")


def read_cell(path: Path) -> dict[str, Any] | None:
    """The result that was kept for a cell; None if there is none, or the file is not as it was written."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        result: dict[str, Any] = kept["result"]
        if kept["digest"] == digest([kept["cell"], result]):
            return result
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    say(f"{path}: damaged; this cell is run again")
    return None


def write_cell(path: Path, identity: dict[str, Any], result: dict[str, Any]) -> None:
    """Keeps a result, whole or not at all."""
    kept = {"cell": identity, "result": result, "digest": digest([identity, result])}
    replace_text(path, json.dumps(kept, indent=1, allow_nan=False) + "\n")
