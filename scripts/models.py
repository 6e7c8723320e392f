"""Loading models, tokenizers and text for the programs."""

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from artifacts.attention import AttentionLayer, attention_layers
from artifacts.evidence import text_config
from artifacts.fingerprint import model_fingerprint, vocabulary_digest
from calib.demo import model_folder
from scripts.console import UsageError, say
from scripts.options import DEMO


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with what identifies it.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, on its device.
    tokenizer : object or None
        The model's tokenizer, where the folder has one.
    model_id : str or None
        Hub id; None for a local folder.
    """

    model: nn.Module
    tokenizer: Any
    model_id: str | None

    @property
    def context(self) -> int:
        """Longest sequence that the model takes."""
        return int(text_config(self.model).max_position_embeddings)

    @property
    def tokenizer_digest(self) -> str | None:
        """Digest of the vocabulary, where there is a tokenizer."""
        return vocabulary_digest(self.tokenizer.get_vocab()) if self.tokenizer else None

    def layers(self) -> tuple[AttentionLayer, ...]:
        """The attention layers."""
        return attention_layers(self.model)

    def fingerprint(self, layers: tuple[AttentionLayer, ...]) -> dict[str, Any]:
        """What identifies the model, tokenizer included."""
        return model_fingerprint(self.model, layers, self.tokenizer_digest)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds by itself.

        Raises
        ------
        UsageError
            If the model came without a tokenizer.
        """
        if self.tokenizer is None:
            raise UsageError("the model has no tokenizer: pass tokenised text, --dataset ids.npy")
        ids: list[int] = self.tokenizer(text, verbose=False).input_ids
        return ids

    def window_tokens(self, seqlen: int | None) -> int:
        """Window length: as asked, else 2048 or the context.

        Raises
        ------
        UsageError
            If it is beyond the context, or shorter than two tokens.
        """
        if seqlen is not None and seqlen > self.context:
            raise UsageError(
                f"--seqlen {seqlen} is beyond the model's context of {self.context} tokens. "
                f"Use --seqlen {self.context}, or stretch the context with --maxseqlen {seqlen}."
            )
        if seqlen == 1:
            raise UsageError("--seqlen 1 leaves nothing to predict; use at least 2")
        return seqlen or min(2048, self.context)


def load_model(args: argparse.Namespace) -> LoadedModel:
    """The model that the command line names.

    Raises
    ------
    UsageError
        If the device does not exist.
    OSError
        If there is no such model.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    name, dtype = str(args.model), args.dtype
    if name == DEMO:
        name, dtype = str(model_folder()), "float32" if dtype == "auto" else dtype
    device = _device(args.device)
    source = _source(name)
    try:
        config = AutoConfig.from_pretrained(name, **source)
        _stretch(config, args.maxseqlen)
        options = {**source, **({"device_map": "auto"} if device == "auto" else {})}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise OSError(f"{name}: no model could be loaded: {_first_line(error)}{_hint(name)}") from error
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise OSError(
            f"{name}: {len(missing)} weights are missing from its files, such as {missing[0]}; they would be random. "
            "Restore or download the model again."
        )
    if device != "auto":
        model = model.to(device)
    return LoadedModel(model.eval(), _load_tokenizer(name, source), _model_id(args.model))


def _device(name: str | None) -> str:
    """The device as asked, else CUDA where there is one.

    Raises
    ------
    UsageError
        If there is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = "auto" if name == "auto" else torch.device(name).type
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected cpu, cuda, cuda:1, ... or auto") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: this torch sees no CUDA device; use --device cpu")
    return name


def short_name(model: str) -> str:
    """A model's name for a folder."""
    return Path(model.rstrip("/")).name or "model"


def _model_id(name: str) -> str | None:
    """What an artifact may say of the model: never a path."""
    return None if name != DEMO and os.path.isdir(name) else name


def _source(name: str) -> dict[str, bool]:
    """Where transformers shall look: a folder, the hub, or the hub's local cache when the hub does not answer."""
    from huggingface_hub import constants

    from calib.hub_datasets import hub_answers

    if os.path.isdir(name):
        return {}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise OSError(f"{name}: no such folder. A model is a folder with config.json, or a hub id such as owner/name")
    return {} if hub_answers(constants.ENDPOINT) else {"local_files_only": True}


def _load_tokenizer(name: str, source: dict[str, bool]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **source)
    except (OSError, ValueError, KeyError) as error:
        say(f"note: {name} has no tokenizer that can be loaded ({_first_line(error)}); only tokenised text will do")
        return None


def _stretch(config: Any, max_tokens: int | None) -> None:
    """Linear RoPE scaling by a whole factor where more tokens are asked for than the model was made for."""
    own = config.get_text_config()
    if max_tokens is None or max_tokens <= own.max_position_embeddings:
        return
    factor = float(math.ceil(max_tokens / own.max_position_embeddings))
    own.rope_parameters = {**(own.rope_parameters or {}), "rope_type": "linear", "factor": factor}
    own.max_position_embeddings = max_tokens


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _hint(name: str) -> str:
    if os.path.isdir(name):
        return " A folder needs config.json and model.safetensors as transformers writes them."
    return " Pass the path of a local folder, or check the hub id and the network."
