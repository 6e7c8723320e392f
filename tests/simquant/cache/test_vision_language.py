"""Vision-language models on a packed cache: only the text decoder's attention is replaced, with the masks it has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import n_hooks
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from artifacts.model.attention import attention_layers
from artifacts.model.transformers_release import cache_argument
from artifacts.quantizers.identity import Identity
from artifacts.sites import Site
from simquant import packed_cache

pytestmark = pytest.mark.shapes

IMAGE = 63  # the token that stands for a patch
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(**VISION, projection_dim=16)
    settings = {"image_token_index": IMAGE, "image_token_id": IMAGE, "vision_feature_layer": -1}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), **settings))


def gemma3() -> PreTrainedModel:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    text = {**TEXT, **layers, "model_type": "gemma3_text"}
    vision = {**VISION, "vision_use_head": False, "model_type": "siglip_vision_model"}
    settings = {"image_token_index": IMAGE, "image_token_id": IMAGE, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **settings))


def paligemma() -> PreTrainedModel:
    vision = SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32)
    settings = {"image_token_index": IMAGE, "image_token_id": IMAGE, "projection_dim": 32, "hidden_size": 32}
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(vision_config=vision, text_config=GemmaConfig(**TEXT), **settings)
    )


def idefics2() -> PreTrainedModel:
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8}
    return Idefics2ForConditionalGeneration(
        Idefics2Config(
            image_token_id=IMAGE,
            vision_config=VISION,
            text_config=MistralConfig(**TEXT).to_dict(),
            perceiver_config={**perceiver, "num_key_value_heads": 2, "hidden_size": 32},
        )
    )


def idefics3() -> PreTrainedModel:
    text = LlamaConfig(**TEXT).to_dict()
    settings = {"image_token_id": IMAGE, "scale_factor": 1, "vision_config": VISION, "text_config": text}
    return Idefics3ForConditionalGeneration(Idefics3Config(**settings))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llava": llava,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "idefics2": idefics2,
    "idefics3": idefics3,
}
every_model = pytest.mark.parametrize("kind", MODELS)


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def identities(model: PreTrainedModel) -> dict[Site, Identity]:
    layers = attention_layers(model)
    return {
        site: Identity(channels=layer.channels)
        for layer in layers
        for site in (Site(layer.layer, "key", "pre_rope"), Site(layer.layer, "value"))
    }


def text() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 27).reshape(2, 12)}


def padded() -> dict[str, Tensor]:
    ids = text()["input_ids"].clone()
    ids[0, :5] = 0
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def image(kind: str) -> dict[str, Tensor]:
    """One image in each of two prompts, the first of them padded on the left."""
    inputs = padded()
    inputs["input_ids"][:, 6:10] = IMAGE
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    inputs["pixel_values"] = pixels[:, None] if kind.startswith("idefics") else pixels
    if kind in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


@torch.no_grad()
def two_steps(model: PreTrainedModel, cache: object, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a prompt, and of one token more."""
    first = model(**inputs, **cache_argument(model, cache), use_cache=True).logits
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    more = {"attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1)}
    if "token_type_ids" in inputs:
        more["token_type_ids"] = torch.zeros(2, 1, dtype=torch.long)
    ids = torch.tensor([[5], [6]])
    second = model(input_ids=ids, **more, **cache_argument(model, cache), use_cache=True).logits
    return torch.cat([first, second], dim=1)[more["attention_mask"].bool()]


def settings(model: PreTrainedModel) -> list[Any]:
    """What the context changes for a while."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [n_hooks(model), *(config._attn_implementation for config in configs)]


@every_model
@pytest.mark.parametrize("what", ["text", "padded", "image"])
def test_a_packed_cache_serves_vision_language_models(what: str, kind: str) -> None:
    """The vision tower's attention was replaced, too, and stopped at the mask that it does not have."""
    model = build(kind)
    inputs = image(kind) if what == "image" else text() if what == "text" else padded()
    expected = two_steps(model, DynamicCache(), inputs)
    before = settings(model)
    with packed_cache(model, identities(model)) as new_cache:
        found = two_steps(model, new_cache(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert settings(model) == before


@pytest.mark.parametrize("kind", ["gemma3", "paligemma"])
def test_tokens_of_an_image_see_each_other(kind: str) -> None:
    """So that the equality above says that masks which are not causal survive."""
    model, inputs = build(kind), image(kind)
    with packed_cache(model, identities(model)) as new_cache:
        seen = two_steps(model, new_cache(), inputs)
        inputs["token_type_ids"] = torch.full_like(inputs["token_type_ids"], kind == "paligemma")
        causal = two_steps(model, new_cache(), inputs)
    assert (seen - causal).abs().max() > 0.01
