"""A GGUF file, as llama.cpp keeps models, and what must hold before and after transformers reads it."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvgauge.terminal.console import UsageError

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
"""Names of the parts that llama-gguf-split makes."""

_ROPE_TENSOR = re.compile(r"rope_(freqs|factors_\w+)\.weight$")

_DOWNLOAD_AGAIN = "Compare its size and SHA-256 with those at its source, and download it again"


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header has been read.

    Parameters
    ----------
    path : Path
        Absolute, so that transformers does not look for its name in the working directory.
    metadata : Mapping[str, object]
        Keys of its header; long arrays of strings by their lengths.
    tensors : tuple of str
        Names of its tensors.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "GgufFile":
        """Reads the header, and refuses what transformers would not make a whole language model of.

        Raises
        ------
        UsageError
            If packages for reading it are not installed.
        OSError
            If it is no GGUF file, cut, a part of one, or of a kind that transformers does not read.
        """
        check_packages(path)
        part = _PART.search(path.name)
        if part and int(part[2]) > 1:
            whole = path.name[: part.start()] + ".gguf"
            raise OSError(
                f"{path}: part {int(part[1])} of {int(part[2])} of a split GGUF file; transformers reads one file. "
                f"Join the parts with llama.cpp, llama-gguf-split --merge FIRST_PART {whole}, and pass {whole}"
            )
        found = cls(path.absolute(), *_header(path))
        found._check_kind(path)
        return found

    @property
    def architecture(self) -> str:
        """Architecture by llama.cpp's name."""
        return str(self.metadata["general.architecture"])

    @property
    def rope_tensors(self) -> list[str]:
        """Names of tensors that divide single frequencies of RoPE."""
        return [name for name in self.tensors if _ROPE_TENSOR.search(name)]

    def _check_kind(self, path: Path) -> None:
        if self.architecture == "clip":
            raise OSError(
                f"{path}: a vision tower (mmproj), which has no language model in it; pass the GGUF file of the model "
                "that it belongs to"
            )
        readable = _readable_architectures()
        if _plain(self.architecture) not in map(_plain, readable):
            raise OSError(
                f"{path}: transformers cannot read GGUF files of the architecture {self.architecture!r}; it reads "
                f"{', '.join(readable)}. Pass the model's folder or hub id in place of this file"
            )
        if "tokenizer.ggml.tokens" not in self.metadata:
            raise OSError(
                f"{path}: has no tokenizer (tokenizer.ggml.tokens), from which transformers takes the size of the "
                "vocabulary. Convert the model with its tokenizer, or pass its folder"
            )

    def check_used(self, model: Any) -> None:
        """Refuses tensors that the model has no place for, as `check_weights` does for other files.

        Raises
        ------
        OSError
            With one of them.
        """
        from transformers.integrations.gguf.utils import is_gguf_arch_supported

        if is_gguf_arch_supported(self.architecture):
            return  # these files are read by name, and what is left over is reported
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        kind: Any = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)
        processor = kind(config=model.config.to_dict())
        known = get_gguf_hf_weights_map(model, processor)
        unused = [name for name in self.tensors if name not in known and name not in self.rope_tensors]
        if unused:
            raise OSError(
                f"{self.path.name}: {len(unused)} of its tensors have no place in {type(model).__name__}, such as "
                f"{unused[0]}; it would run without them. Pass the model's folder or hub id"
            )


def unpacked() -> dict[str, Any]:
    """Arguments of `from_pretrained` by which weights are unpacked, also where kernels could read them as they are."""
    from transformers import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


def make_plain(model: Any) -> None:
    """Takes the signs of a quantized model off one whose weights are unpacked, so that it is saved as any other."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def check_packages(name: object) -> None:
    """Refuses to go on without what transformers reads GGUF files with.

    Parameters
    ----------
    name : object
        Path or name of a model, for the message.

    Raises
    ------
    UsageError
        With what to install.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise UsageError(f"{name}: GGUF files need {' and '.join(missing)}: pip install 'kvgauge[gguf]'")


def _header(path: Path) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Metadata and names of tensors.

    Raises
    ------
    OSError
        If the file has no whole header.
    """
    from transformers.integrations.gguf.reader import read_gguf_metadata

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise OSError(f"{path}: no GGUF file: it begins with {magic!r}, expected b'GGUF'. {_DOWNLOAD_AGAIN}")
    try:
        return read_gguf_metadata(str(path))
    except (ValueError, struct.error, OverflowError, MemoryError) as error:
        reason = str(error).replace(f"{path} ", "")
        raise OSError(f"{path}: its header cannot be read ({reason}). {_DOWNLOAD_AGAIN}") from error


def cut_hint(path: Path) -> str:
    """Advice for a file whose header is whole, and whose tensors are not."""
    return f"; its header is whole, its tensors may be cut at {path.stat().st_size:,} bytes. {_DOWNLOAD_AGAIN}"


def _readable_architectures() -> list[str]:
    """Names by which transformers knows the architectures that it reads."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS

    # The table also maps sections of the header that belong to no architecture; these count no layers.
    sections: Mapping[str, Any] = GGUF_CONFIG_MAPPING
    return sorted({name for name, keys in sections.items() if "block_count" in keys} | {*GGUF_ARCHS})


def _plain(architecture: str) -> str:
    # llama.cpp writes qwen2moe and gpt-oss where transformers writes qwen2_moe and gpt_oss.
    return architecture.replace("-", "").replace("_", "")
