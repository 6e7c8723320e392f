"""What a model's name stands for: the bundled model, a known one, a folder, a GGUF file, or something on the hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.demo import model_folder
from kvgauge.configuration.model import DEMO
from kvgauge.loading.checkpoint import holds_weights
from kvgauge.loading.gguf_file import GgufFile
from kvgauge.loading.known_models import KNOWN_MODELS

_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):([^:]+\.gguf)", re.IGNORECASE)
"""A GGUF file of a hub repository, owner/name:file.gguf."""


@dataclass(frozen=True)
class Source:
    """A place that transformers loads from.

    Parameters
    ----------
    place : str
        Folder or hub id.
    model_id : str or None
        Name that an artifact may record, by which others find the model; None for a path.
    gguf : GgufFile or None
        File in that folder that holds the model, where transformers' own files do not.
    is_offline : bool
        True for a hub id that must be looked for in the local cache, because the hub does not answer.
    """

    place: str
    model_id: str | None
    gguf: GgufFile | None = None
    is_offline: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained`; no code runs but that of transformers."""
        file = {} if self.gguf is None else {"gguf_file": str(self.gguf.path)}
        # Without trust_remote_code=False transformers asks on a terminal, and runs what comes with the model.
        return {"trust_remote_code": False, "local_files_only": self.is_offline, **file}


def find_source(name: str) -> Source:
    """The place that a name stands for; `demo` and the known models come before folders of the same name.

    Raises
    ------
    UsageError
        If a known model is not downloaded yet, or packages for reading GGUF files are missing.
    OSError
        If there is no such path, or a GGUF file is not whole or not of a kind that transformers reads.
    """
    if name == DEMO:
        return Source(str(model_folder()), DEMO)
    if name in KNOWN_MODELS:
        return Source(str(KNOWN_MODELS[name].found()), name)
    path = Path(name)
    if path.exists():
        file = _gguf_in(path)
        return Source(name, None) if file is None else _of_gguf(file, None)
    on_hub = _HUB_FILE.fullmatch(name)
    if on_hub:
        return _of_gguf(_downloaded(*on_hub.groups()), name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(".gguf"):
        raise OSError(
            f"{name}: no such file or folder. A model is a folder with config.json, a .gguf file, or a hub id such as "
            "owner/name or owner/name:file.gguf"
        )
    return Source(name, name, is_offline=not _hub_answers())


def _of_gguf(file: Path, model_id: str | None) -> Source:
    return Source(str(file.parent), model_id, GgufFile.read(file))


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path names, or that is all that a folder has for a model.

    Raises
    ------
    OSError
        If there are several.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if not files or holds_weights(path):
        return None
    if len(files) > 1:
        raise OSError(f"{path}: holds {len(files)} GGUF files; pass one of them: {', '.join(map(str, files))}")
    return files[0]


def _downloaded(repository: str, file: str) -> Path:
    """A file of a hub repository in the local cache, downloaded where the hub answers.

    Raises
    ------
    OSError
        If it cannot be had.
    """
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(repository, file, local_files_only=not _hub_answers())
    except OSError as error:
        told = str(error).splitlines()[0]
        raise OSError(f"{repository}:{file}: {told} Check both names and the network, or pass a file's path") from error
    assert found is not None  # cached_file raises where there is none, unless it is told not to
    return Path(os.fspath(found))


def _hub_answers() -> bool:
    from huggingface_hub import constants

    from calib.text.hub_datasets import hub_answers

    return hub_answers(constants.ENDPOINT)
