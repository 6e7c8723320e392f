"""Loading models, tokenizers and text for the programs."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from artifacts.model.attention import AttentionLayer, attention_layers
from artifacts.model.evidence import text_config
from artifacts.model.fingerprint import model_fingerprint, vocabulary_digest
from artifacts.model.transformers_release import check_release
from calib.recipe.errors import nearest
from calib.text.conversations import ChatTemplate, Message
from calib.text.corpus import Corpus, PaddingIds, Split, load_corpus
from calib.text.hub_datasets import SELF
from calib.text.script import Script
from calib.text.written import WrittenText
from kvgauge.configuration.model import DEMO, ModelConfig
from kvgauge.loading.checkpoint import check_weights, other_format, remote_code
from kvgauge.loading.gguf_file import cut_hint, make_plain, unpacked
from kvgauge.loading.gguf_rope import complete_rope
from kvgauge.loading.known_models import KNOWN_MODELS
from kvgauge.loading.rope_stretch import stretch
from kvgauge.loading.source import Source, find_source
from kvgauge.terminal.console import UsageError, bar, say


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
        Name by which others find it, such as a hub id; None for a local path.
    """

    model: nn.Module
    tokenizer: Any
    model_id: str | None

    @property
    def context(self) -> int:
        """Longest sequence that the model takes; where positions have no limit (ALiBi), longer than any text."""
        return int(getattr(text_config(self.model), "max_position_embeddings", None) or sys.maxsize)

    @property
    def tokenizer_digest(self) -> str | None:
        """Digest of the vocabulary, where there is a tokenizer."""
        return vocabulary_digest(self.tokenizer.get_vocab()) if self.tokenizer else None

    def layers(self) -> tuple[AttentionLayer, ...]:
        """The attention layers."""
        return attention_layers(self.model)

    def fingerprint(self, layers: tuple[AttentionLayer, ...]) -> dict[str, Any]:
        """Fingerprint of the model, tokenizer included."""
        return model_fingerprint(self.model, layers, self.tokenizer_digest)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds by itself.

        Raises
        ------
        UsageError
            If the model came without a tokenizer.
        """
        if self.tokenizer is None:
            raise UsageError(
                "the model has no tokenizer; pass token ids, --dataset ids.npy, or add its tokenizer files"
            )
        ids: list[int] = self.tokenizer(text, verbose=False).input_ids
        return ids

    @property
    def chat(self) -> ChatTemplate | None:
        """Token ids of messages, by the chat template, where there is one."""

        def read(messages: Sequence[Message]) -> list[int]:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False)
            # The template writes the special tokens itself; the tokenizer would add a second start token.
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            return ids

        return read if getattr(self.tokenizer, "chat_template", None) else None

    @cached_property
    def written(self) -> dict[Split, WrittenText]:
        """Texts of the model's own, which are written when windows of them are asked for."""
        script = Script.of(self.tokenizer, self.model)
        parts: tuple[Split, ...] = ("calibration", "evaluation")
        return {part: WrittenText(self.model, script, part, lambda steps: bar(steps, "writing text")) for part in parts}

    def corpus(self, dataset: str, split: Split, field: str) -> Corpus | WrittenText:
        """A text as this model reads it, or writes it.

        Parameters
        ----------
        dataset, split, field
            See `calib.load_corpus`.

        Raises
        ------
        CorpusError
            If the text cannot be had.
        """
        if dataset == SELF:
            if split == "evaluation":
                say("note: self: the model wrote this text; the loss on it compares caches, and is no loss on text")
            return self.written[split]
        return load_corpus(
            dataset,
            split,
            self.encode,
            field=field,
            padding=PaddingIds.of(self.tokenizer),
            chat=self.chat,
            vocab_size=text_config(self.model).vocab_size,
        )

    def start_token(self, wanted: bool) -> int | None:
        """The token that prompts begin with, if it is wanted.

        Raises
        ------
        UsageError
            If the tokenizer has none.
        """
        token: int | None = getattr(self.tokenizer, "bos_token_id", None)
        if wanted and token is None:
            raise UsageError("--bos: the model's tokenizer has no start token (bos_token); remove --bos")
        return token if wanted else None

    def window_tokens(self, seqlen: int | None) -> int:
        """Tokens of a window: as asked, else 2048 or the context.

        Raises
        ------
        UsageError
            If it is beyond the context, or shorter than two tokens.
        """
        if seqlen is not None and seqlen > self.context:
            raise UsageError(
                f"--seqlen {seqlen} is longer than the model's context of {self.context} tokens. "
                f"Use --seqlen {self.context}, or extend the context with --maxseqlen {seqlen}."
            )
        if seqlen == 1:
            raise UsageError("--seqlen 1 leaves nothing to predict; use at least 2")
        return seqlen or min(2048, self.context)


def load_model(config: ModelConfig) -> LoadedModel:
    """The model of a configuration, ready to run.

    Raises
    ------
    UsageError
        If the device does not exist, or a known model is not downloaded yet.
    OSError
        If there is no such model, or something else than a whole one.
    UnsupportedReleaseError
        If the installed release of transformers is not supported.
    """
    check_release()
    name, dtype = config.name, config.dtype
    if name == DEMO and dtype == "auto":
        dtype = "float32"
    device = _device(config.device)
    source = find_source(name)
    told = other_format(source.place, source.is_offline)
    if told is not None:
        raise OSError(f"{name} {told}")
    placed = {"device_map": "auto"} if device == "auto" else {}
    model = _model(name, source, config.maxseqlen, dtype=dtype, **placed)
    if device != "auto":
        model = model.to(device)
    return LoadedModel(model.eval(), _load_tokenizer(name, source), source.model_id)


def _model(name: str, source: Source, max_tokens: int | None, **options: Any) -> Any:
    """The model with all of its weights, and no code but that of transformers.

    Raises
    ------
    UsageError
        If its context cannot be stretched to `max_tokens`.
    OSError
        If there is no such model, or its files do not make it up.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _told(name, source):
        config: Any = AutoConfig.from_pretrained(source.place, **source.options)
    if source.gguf is not None:
        complete_rope(config.get_text_config(), source.gguf)
    stretch(config, max_tokens)
    with _told(name, source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.place,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told with their shapes below
            **source.options,
            **({} if source.gguf is None else unpacked()),
            **options,
        )
    model, loading = loaded
    spare = check_weights(name, type(model).__name__, loading)
    if source.gguf is not None:
        source.gguf.check_used(model)
        make_plain(model)
    if spare:
        say(f"note: {name}: {len(spare)} weights are not part of the language model, such as {spare[0]}; left out")
    return model


@contextmanager
def _told(name: str, source: Source) -> Iterator[None]:
    """Errors of transformers, told in a line with what to do.

    Raises
    ------
    OSError
        In their place.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        told = remote_code(source.place, source.is_offline) if isinstance(error, ValueError) else None
        raise OSError(
            told or f"{name}: no model could be loaded: {_first_line(error)}{_hint(source, error)}"
        ) from error


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


def _load_tokenizer(name: str, source: Source) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.place, **source.options)
    except (OSError, ValueError, KeyError) as error:
        say(f"note: {name} has no tokenizer that can be loaded ({_first_line(error)}); pass token ids as .npy")
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _hint(source: Source, error: Exception) -> str:
    if source.gguf is not None:
        return cut_hint(source.gguf.path)
    if isinstance(error, RuntimeError):
        return ""
    if os.path.isdir(source.place):
        return " A folder needs config.json and model.safetensors as transformers writes them."
    return (
        f"{nearest(source.place, KNOWN_MODELS)} Pass the path of a local folder, or check the hub id and the network."
    )
