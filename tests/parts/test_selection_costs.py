from __future__ import annotations

import torch
import transformers
from PIL import Image

from gossamer.parts.selection_costs import draw_kept, layer_operations, median_ms, ranking_operations


def test_the_cost_of_a_layer_is_the_papers() -> None:
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96)
    assert layer_operations(config, 10) == 4 * 10 * 64**2 + 2 * 100 * 64 + 3 * 10 * 64 * 96


def test_shared_keys_and_own_head_sizes_count() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=8, intermediate_size=96
    )
    projections = 10 * 64 * (32 + 8 + 8 + 32)
    assert layer_operations(config, 10) == projections + 2 * 100 * 32 + 3 * 10 * 64 * 96
    assert ranking_operations(config, 10, 2) == 10 * 64 * 8 + 2 * (64 * 32 + 10 * 32)


def test_a_panel_a_stage() -> None:
    kept = torch.tensor([True, False, False, True])
    panels = draw_kept(Image.new("RGB", (20, 20), "white"), [(0, torch.ones(4).bool()), (3, kept)])
    assert panels.size == (40, 20)
    corners = [panels.getpixel((20 + x, y)) == (255, 255, 255) for y in (2, 17) for x in (2, 17)]
    assert corners == kept.tolist()


def test_contenders_take_turns() -> None:
    said: list[str] = []
    times = median_ms({"one": lambda: said.append("a"), "two": lambda: said.append("b")}, 2)
    assert said == ["a", "b"] * 3
    assert set(times) == {"one", "two"}
