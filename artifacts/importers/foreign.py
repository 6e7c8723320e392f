"""Opens artifacts of kvgauge and of other tools."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from artifacts.artifact import Artifact, load
from artifacts.errors import CorruptArtifactError
from artifacts.importers import kvquant, llama3_simquant, msmodelslim
from artifacts.importers.hints import Hints
from artifacts.importers.restricted_pickle import read_pickle
from artifacts.manifest import CorpusRecord, Manifest, tool_version
from artifacts.quantizer import Quantizer
from artifacts.sites import Site


@dataclass(frozen=True)
class Opened:
    """Artifact with the assumptions made to import it.

    Parameters
    ----------
    artifact : Artifact
        Ready to run.
    notices : tuple of str
        Settings that a foreign file lacked and the values assumed; empty for a kvgauge file.
    """

    artifact: Artifact
    notices: tuple[str, ...] = ()


def open_foreign(path: str | Path, hints: Hints | None = None) -> Opened:
    """Reads an artifact of kvgauge, KVQuant, LLaMA3-simquant or msModelSlim, recognised by content.

    Parameters
    ----------
    path : str or Path
        A file, or msModelSlim's folder.
    hints : Hints or None
        Settings that a foreign file lacks.

    Returns
    -------
    Opened
        The artifact, and notices of assumptions.

    Raises
    ------
    ArtifactError
        `CorruptArtifactError` for a damaged file or one of another kind, `MismatchError` where hints and file
        contradict each other or a hint is missing.
    """
    path, hints = Path(path), hints or Hints()
    if path.is_dir() and msmodelslim.is_folder(path):
        quantizers, notices = msmodelslim.quantizers(path)
        return _opened(path, "msModelSlim", quantizers, notices, hints)
    if not path.is_file() or not _is_foreign_pickle(path):
        return Opened(load(path))
    content = read_pickle(path, path.read_bytes())
    if not isinstance(content, dict) or not content:
        raise CorruptArtifactError(f"{path}: expected quantizers by module name; got {type(content).__name__}")
    simulated = llama3_simquant.wrote(content)
    importer = llama3_simquant if simulated else kvquant
    quantizers, notices = importer.quantizers(path, content, hints)
    return _opened(path, "LLaMA3-simquant" if simulated else "KVQuant", quantizers, notices, hints)


def _is_foreign_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.read(64)
    # A pickle starts with 0x80, as may the length that starts a safetensors file: its JSON starts at byte 8.
    return first[:1] == b"\x80" and first[8:9] != b"{" and b"kvgauge" not in first


def _opened(path: Path, tool: str, quantizers: Mapping[Site, Quantizer], notices: list[str], hints: Hints) -> Opened:
    taken = f"assumed to be a file of {tool}, without a record of its model and text"
    manifest = Manifest(
        specs={site: quantizer.spec for site, quantizer in quantizers.items()},
        model={},
        model_id=None,
        corpus=CorpusRecord(name="unknown", digest="", n_windows=0, n_tokens=0, seqlen=0),
        recipe={"name": "imported", "source": tool},
        sink_tokens=hints.sink_tokens,
        fit_sources={str(site): f"imported from {tool}" for site in quantizers},
        tool_version=tool_version(),
    )
    return Opened(Artifact(quantizers, manifest), (*(f"{path}: {notice}" for notice in notices), f"{path}: {taken}"))
