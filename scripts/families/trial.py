"""One family: its layers are found, calibrated, simulated, and kept in a packed cache; or the reason why not."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from artifacts.artifact import Artifact
from artifacts.errors import KVGaugeError
from artifacts.model.attention import AttentionLayer, attention_layers
from artifacts.model.transformers_release import cache_argument
from artifacts.quantizers.identity import Identity
from calib import calibrate
from scripts.families.tiny import VOCABULARY, tiny_model
from simquant import CachePolicy, packed_cache, simulate

Verdict = Literal["applied", "simulated", "refused", "not built", "wrong"]

_POLICY = CachePolicy(sink_tokens=1)
_NEW_TOKENS = 4
_AGREES = 0.05
"""Share of what quantization changes by which a cache may differ from the simulation: the order of sums in float32."""


@dataclass(frozen=True)
class Outcome:
    """What became of a family.

    Parameters
    ----------
    verdict : str
        'applied': simulated, and a packed cache says the same; 'simulated': without a packed cache; 'refused' by an
        error of ours; 'not built' or run by transformers; 'wrong': another error, or results that should agree differ.
    why : str
        Reason of all but 'applied'.
    layers : str
        Layers with keys and values, of all.
    """

    verdict: Verdict
    why: str = ""
    layers: str = ""


class Wrong(Exception):
    """Results that should agree differ."""


def outcome(family: str) -> Outcome:
    """Tries a family of transformers' AutoModelForCausalLM."""
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    try:
        model = tiny_model(family)
        _logits(model, ids)
    except Exception as error:  # the code of any family may raise anything
        return Outcome("not built", _said(error))
    try:
        layers = attention_layers(model)
        _check_simulation(model, layers, artifact := calibrate(model, ids, "kvquant", bits=2), ids)
    except KVGaugeError as error:
        return Outcome("refused", _said(error))
    except Exception as error:
        return Outcome("wrong", _said(error))
    found = f"{len(layers)} of {model.config.get_text_config().num_hidden_layers}"
    try:
        _check_cache(model, layers, artifact, ids[:1, :16])
    except KVGaugeError as error:
        return Outcome("simulated", _said(error), found)
    except Exception as error:
        return Outcome("wrong", _said(error), found)
    return Outcome("applied", "", found)


def _check_simulation(
    model: PreTrainedModel, layers: tuple[AttentionLayer, ...], artifact: Artifact, ids: Int64[Tensor, "_ _"]
) -> None:
    exact = _logits(model, ids)
    identities = {site: Identity(channels=own.channels, site=site) for site, own in artifact.items()}
    with simulate(model, identities, layers=layers):
        if not torch.equal(_logits(model, ids), exact):
            raise Wrong("identity quantizers change the logits")
    for tensor in ("key", "value"):
        mixed = {site: artifact[site] if site.tensor == tensor else own for site, own in identities.items()}
        with simulate(model, mixed, layers=layers, policy=_POLICY):
            if torch.equal(_logits(model, ids), exact):
                raise Wrong(f"quantized {tensor}s do not change the logits")
    if not torch.equal(_logits(model, ids), exact):
        raise Wrong("the model is not as it was")


def _check_cache(
    model: PreTrainedModel, layers: tuple[AttentionLayer, ...], artifact: Artifact, prompt: Int64[Tensor, "_ _"]
) -> None:
    """Checks that tokens generated on a packed cache have the logits of those generated in simulation."""
    exact = _generated(model, prompt)
    with simulate(model, artifact, layers=layers, policy=_POLICY):
        simulated = _generated(model, prompt)
    with packed_cache(model, artifact, layers=layers, policy=_POLICY) as new_cache:
        packed = _generated(model, prompt, **cache_argument(model, new_cache()))
    # The median over tokens: rounding may send a single token to another code or another expert.
    off, changed = ((one - simulated).norm(dim=-1).median() for one in (packed, exact))
    if not off <= _AGREES * changed:
        raise Wrong(f"a packed cache differs from the simulation by {off:.2g}; quantization changes {changed:.2g}")


@torch.no_grad()
def _generated(model: PreTrainedModel, prompt: Int64[Tensor, "_ _"], **cache: Any) -> Tensor:
    """Logits of a few greedy tokens after a prompt."""
    options: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(prompt)}
    generate: Any = model.generate
    return torch.stack(generate(prompt, **cache, **options).logits, dim=1)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Int64[Tensor, "_ _"]) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _said(error: Exception) -> str:
    """The first sentence of an error; of one that is not ours, its class too."""
    words = re.split(r"; `|(?<=[a-z)\]])\. ", str(error).strip().split("\n")[0])[0].rstrip(".")
    return words if isinstance(error, KVGaugeError | Wrong) else f"{type(error).__name__}: {words}"
