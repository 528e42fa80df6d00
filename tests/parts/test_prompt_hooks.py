"""Deep prompts agree with a loop over the layers written out, go out without trace, and follow a copied model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from gossamer.core.errors import InputError
from gossamer.parts.prompt_hooks import DeepPrompts, attach_prompts, encoder_layers, find_tower

LAYERS, EOS = 4, 39
TEXT = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 38, "eos_token_id": EOS}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip
IDS = torch.tensor([[38, 5, 6, 7, 11, EOS, EOS, EOS], [38, 5, 6, 7, 12, 13, 14, EOS]])
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def model() -> Any:
    torch.manual_seed(0)
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20)
    return CLIPModel(config).eval()


def prompts(width: int, depth: int, tokens: int = 3) -> DeepPrompts:
    return DeepPrompts(width, tokens=tokens, depth=depth, std=0.5, generator=torch.Generator().manual_seed(2))


def image_features(model: Any) -> Tensor:
    return model.get_image_features(pixel_values=PIXELS).pooler_output


def text_features(model: Any) -> Tensor:
    return model.get_text_features(input_ids=IDS).pooler_output


def looped_image(model: Any, vectors: Tensor) -> Tensor:
    """The same by hand: concatenate once, and overwrite the last M tokens before layers 1 ... J-1."""
    tower, (depth, count, _) = model.vision_model, vectors.shape
    hidden = torch.cat([tower.embeddings(PIXELS), vectors[0].expand(3, -1, -1)], dim=1)
    hidden = tower.pre_layrnorm(hidden)
    for number, layer in enumerate(tower.encoder.layers):
        if 1 <= number < depth:
            hidden = torch.cat([hidden[:, :-count], vectors[number].expand(3, -1, -1)], dim=1)
        hidden = layer(hidden, None)
    return model.visual_projection(tower.post_layernorm(hidden[:, 0]))


def looped_text(model: Any, vectors: Tensor) -> Tensor:
    tower, (depth, count, _) = model.text_model, vectors.shape
    embedded = tower.embeddings.token_embedding(IDS).clone()
    embedded[:, 1 : 1 + count] = vectors[0]
    hidden = embedded + tower.embeddings.position_embedding.weight[: IDS.shape[1]]
    mask = torch.full((8, 8), -torch.inf).triu(1)[None, None]
    for number, layer in enumerate(tower.encoder.layers):
        if 1 <= number < depth:
            hidden = hidden.clone()
            hidden[:, 1 : 1 + count] = vectors[number]
        hidden = layer(hidden, mask)
    ends = tower.final_layer_norm(hidden)[torch.arange(2), torch.tensor([5, 7])]
    return model.text_projection(ends)


@pytest.mark.parametrize("depth", [1, 3, LAYERS])
@pytest.mark.parametrize("side", ["vision", "text"])
def test_forward_and_gradients_agree_with_the_loop(side: str, depth: int) -> None:
    features, looped = (image_features, looped_image) if side == "vision" else (text_features, looped_text)
    ours, naive = model(), model()
    own = prompts(32 if side == "vision" else 24, depth)
    attach_prompts(ours, side, own)
    free = own.vectors.detach().clone().requires_grad_()
    found, expected = features(ours), looped(naive, free)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(own.vectors.grad, free.grad, atol=1e-5, rtol=1e-4)
    assert own.vectors.grad.flatten(1).norm(dim=1).gt(0).all()


@pytest.mark.parametrize("side", ["vision", "text"])
def test_off_and_removed_are_bit_for_bit_the_tower(side: str) -> None:
    features = image_features if side == "vision" else text_features
    clip = model()
    before = features(clip)
    own = prompts(32 if side == "vision" else 24, 3)
    hooks = attach_prompts(clip, side, own)
    assert not torch.equal(features(clip), before)
    with own.off():
        assert torch.equal(features(clip), before)
    assert not torch.equal(features(clip), before)
    hooks.remove()
    assert torch.equal(features(clip), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in clip.modules())


def test_the_outputs_keep_their_shapes() -> None:
    clip = model()
    shape = clip.vision_model(PIXELS).last_hidden_state.shape
    attach_prompts(clip, "vision", prompts(32, 2))
    assert clip.vision_model(PIXELS).last_hidden_state.shape == shape


def test_pooling_finds_the_end_of_text_behind_placeholders() -> None:
    clip = model()
    attach_prompts(clip, "text", prompts(24, 2))
    padded = torch.cat([IDS, torch.full((2, 2), EOS)], dim=1)
    short, long = (clip.get_text_features(input_ids=ids).pooler_output for ids in (IDS, padded))
    torch.testing.assert_close(short, long)


def test_only_the_places_of_the_prompts_lose_their_ids() -> None:
    clip = model()
    attach_prompts(clip, "text", prompts(24, 1))
    before = text_features(clip)
    other = IDS.clone()
    other[:, 1:4] = 20
    assert torch.equal(clip.get_text_features(input_ids=other).pooler_output, before)
    other[:, 4] = 20
    assert not torch.equal(clip.get_text_features(input_ids=other).pooler_output, before)


def test_a_copy_has_prompts_of_its_own() -> None:
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip, self.prompts = model(), prompts(32, 2)
            attach_prompts(self.clip, "vision", self.prompts)

    one = Holder()
    other = copy.deepcopy(one)
    before = image_features(one.clip)
    with torch.no_grad():
        other.prompts.vectors.add_(1.0)
    assert torch.equal(image_features(one.clip), before)
    assert not torch.equal(image_features(other.clip), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_towers_with_projection_and_other_dtypes(dtype: torch.dtype) -> None:
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=20)).to(dtype)
    text = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, projection_dim=20)).to(dtype)
    attach_prompts(vision, "vision", prompts(32, 2))
    attach_prompts(text, "text", prompts(24, 2))
    assert vision(pixel_values=PIXELS.to(dtype)).image_embeds.dtype == dtype
    assert text(input_ids=IDS).text_embeds.dtype == dtype


def test_siglip_pools_without_the_prompt_slots() -> None:
    torch.manual_seed(0)
    tower = SiglipVisionModel(SiglipVisionConfig(**VISION)).eval()
    own = prompts(32, 2)
    attach_prompts(tower, "vision", own)
    out = tower(pixel_values=PIXELS)
    assert out.last_hidden_state.shape == (3, 4, 32)
    out.pooler_output.sum().backward()
    assert own.vectors.grad.flatten(1).norm(dim=1).gt(0).all()


def test_bad_input_is_refused() -> None:
    clip = model()
    with pytest.raises(InputError, match="must be 32 wide"):
        attach_prompts(clip, "vision", prompts(24, 2))
    with pytest.raises(InputError, match="must reach at most its 4 layers"):
        attach_prompts(clip, "vision", prompts(32, 5))
    with pytest.raises(InputError, match="must leave room for text"):
        attach_prompts(clip, "text", prompts(24, 1, tokens=11))
    with pytest.raises(InputError, match="must have a text tower"):
        attach_prompts(clip.vision_model, "text", prompts(24, 1))
    attach_prompts(clip, "text", prompts(24, 1))
    with pytest.raises(InputError, match="must hold a start token, 3 placeholders"):
        clip.get_text_features(input_ids=IDS[:, :4])
    assert len(encoder_layers(find_tower(clip, "vision"))) == LAYERS
