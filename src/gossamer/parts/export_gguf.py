"""Llama- and Gemma-3-type models as one GGUF file, for llama.cpp and what is built on it.

The layouts differ from transformers' in two places:

    llama    rows of q and k: transformers turns element i with i + d/2, GGUF 2i with 2i + 1; within each head of d rows
             W.reshape(h, 2, d/2, in).swap(1, 2)
    gemma3   transformers' norms compute x (1 + w), GGUF's x w: every norm weight + 1

Matrices are written in the type asked for, vectors in float32. Under q4_0 the embedding and the head are q8_0, since
they lose most; a matrix whose rows are no multiple of 32 stays f16. Blocks of 32 weights share a float16 scale: 8.5
bits a weight for q8_0, 4.5 for q4_0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType, quantize
from gguf.constants import MODEL_ARCH_NAMES, RopeScalingType

from gossamer.core.errors import InputError
from gossamer.parts.export_gguf_tokens import GgufTokens
from gossamer.parts.export_plain import refuse_own_shapes

ARCHITECTURES = {"LlamaForCausalLM": MODEL_ARCH.LLAMA, "Gemma3ForCausalLM": MODEL_ARCH.GEMMA3}
TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_BITS = {GGMLQuantizationType.F16: 16.0, GGMLQuantizationType.Q8_0: 8.5, GGMLQuantizationType.Q4_0: 4.5}
_BLOCK = 32
_WHERE = "export gguf"
_LAYER = {
    "input_layernorm": MODEL_TENSOR.ATTN_NORM,
    "self_attn.q_proj": MODEL_TENSOR.ATTN_Q,
    "self_attn.k_proj": MODEL_TENSOR.ATTN_K,
    "self_attn.v_proj": MODEL_TENSOR.ATTN_V,
    "self_attn.o_proj": MODEL_TENSOR.ATTN_OUT,
    "mlp.gate_proj": MODEL_TENSOR.FFN_GATE,
    "mlp.up_proj": MODEL_TENSOR.FFN_UP,
    "mlp.down_proj": MODEL_TENSOR.FFN_DOWN,
}
_LLAMA_LAYER = {**_LAYER, "post_attention_layernorm": MODEL_TENSOR.FFN_NORM}
_GEMMA_LAYER = {
    **_LAYER,
    "self_attn.q_norm": MODEL_TENSOR.ATTN_Q_NORM,
    "self_attn.k_norm": MODEL_TENSOR.ATTN_K_NORM,
    "post_attention_layernorm": MODEL_TENSOR.ATTN_POST_NORM,
    "pre_feedforward_layernorm": MODEL_TENSOR.FFN_NORM,
    "post_feedforward_layernorm": MODEL_TENSOR.FFN_POST_NORM,
}


def check_gguf_model(model: Any) -> None:
    """InputError for a model that GGUF has no name for, or that llama.cpp would compute otherwise than it is."""
    name, config = type(model).__name__, model.config
    if name not in ARCHITECTURES:
        known = ", ".join(f"{cls} ({MODEL_ARCH_NAMES[arch]})" for cls, arch in ARCHITECTURES.items())
        _refuse(f"get an architecture that is written to GGUF here: {known}", name, "export to safetensors or onnx")
    refuse_own_shapes(model, _WHERE)
    gemma = name.startswith("Gemma3")
    activation, wanted = (config.hidden_activation, "gelu_pytorch_tanh") if gemma else (config.hidden_act, "silu")
    fixed = {"activation": (activation, wanted), "attention_bias": (config.attention_bias, False)}
    if gemma:
        fixed["query_pre_attn_scalar"] = (config.query_pre_attn_scalar, config.head_dim)
        fixed["attn_logit_softcapping"] = (config.attn_logit_softcapping, None)
        fixed["final_logit_softcapping"] = (config.final_logit_softcapping, None)
        fixed["use_bidirectional_attention"] = (bool(config.use_bidirectional_attention), False)
        full, sliding = _gemma_ropes(config)
        fixed["rope type of sliding layers"] = (sliding["rope_type"], "default")
    else:
        full = config.rope_parameters
        fixed["mlp_bias"] = (config.mlp_bias, False)
    for key, (value, needed) in fixed.items():
        if value != needed:
            _refuse(f"find {key} = {needed!r}, which is all that llama.cpp computes", repr(value))
    types = ("default", "linear") if gemma else ("default", "linear", "llama3")
    if full["rope_type"] not in types or full.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse(f"find whole rotary positions of type {' or '.join(types)}", dict(full))


def gguf_bytes(model: Any, kind: str) -> int:
    """Bytes of the file, by the shapes of the weights and about 40 for each token of the vocabulary."""
    sizes = {id(tensor): _BITS[_type(name, tensor.shape, kind)] * tensor.numel() / 8
             for name, tensor in model.named_parameters() if tensor.ndim == 2}  # fmt: skip
    return int(sum(sizes.values())) + 40 * model.config.vocab_size + (1 << 16)


def write_gguf(model: Any, tokens: GgufTokens, path: Path, kind: str) -> None:
    """Write a plain float model that :func:`check_gguf_model` passes, with its tokenizer, as ``kind`` to ``path``.

    Raises InputError for weights beyond the range of float16.
    """
    arch = ARCHITECTURES[type(model).__name__]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    _describe(writer, model, kind)
    _add_tokens(writer, tokens)
    for name, tensor in _tensors(model, arch):
        qtype = _type(name, tensor.shape, kind) if tensor.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, _encoded(name, tensor, qtype), raw_dtype=qtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _describe(writer: GGUFWriter, model: Any, kind: str) -> None:
    config, gemma = model.config, type(model).__name__.startswith("Gemma3")
    writer.add_name(Path(str(getattr(config, "_name_or_path", "") or "model")).name)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    if gemma:
        rope, sliding = _gemma_ropes(config)
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
        writer.add_sliding_window(config.sliding_window)
        slides = [layer == "sliding_attention" for layer in config.layer_types]
        if slides != [(layer + 1) % 6 != 0 for layer in range(len(slides))]:  # what readers assume
            writer.add_sliding_window_pattern(slides)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_tokens(writer: GGUFWriter, tokens: GgufTokens) -> None:
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.types)
    if tokens.scores is not None:
        writer.add_token_scores(tokens.scores)
        writer.add_add_space_prefix(tokens.space_prefix)
    if tokens.merges is not None:
        writer.add_token_merges(tokens.merges)
    writer.add_add_bos_token(tokens.adds_bos)
    writer.add_add_eos_token(tokens.adds_eos)
    writer.add_eos_token_id(tokens.eos)
    named = (
        (tokens.bos, writer.add_bos_token_id), (tokens.unk, writer.add_unk_token_id),
        (tokens.pad, writer.add_pad_token_id),
    )  # fmt: skip
    for id_, add in (*named, *zip(tokens.other_ends, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False)):
        if id_ is not None:
            add(id_)
    if tokens.chat_template:
        writer.add_chat_template(tokens.chat_template)


def _tensors(model: Any, arch: MODEL_ARCH) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF names and float32 tensors."""
    gemma, config, body = arch == MODEL_ARCH.GEMMA3, model.config, model.model
    shift = 1.0 if gemma else 0.0
    yield f"{TENSOR_NAMES[MODEL_TENSOR.TOKEN_EMBD]}.weight", body.embed_tokens.weight
    yield f"{TENSOR_NAMES[MODEL_TENSOR.OUTPUT_NORM]}.weight", body.norm.weight + shift
    if model.lm_head.weight is not body.embed_tokens.weight:
        yield f"{TENSOR_NAMES[MODEL_TENSOR.OUTPUT]}.weight", model.lm_head.weight
    if not gemma and config.rope_parameters["rope_type"] == "llama3":
        yield f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight", _slowdown(model)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for number, layer in enumerate(body.layers):
        for path, tensor in (_GEMMA_LAYER if gemma else _LLAMA_LAYER).items():
            weight = layer.get_submodule(path).weight
            if weight.ndim == 1:
                weight = weight + shift
            elif path in heads and not gemma:
                weight = _interleave(weight, heads[path])
            yield f"{TENSOR_NAMES[tensor].format(bid=number)}.weight", weight


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves, which transformers turns, to neighbours."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def _slowdown(model: Any) -> torch.Tensor:
    """What llama.cpp divides each rotary frequency by, [d/2]: the plain ones over those that the model uses."""
    d = model.config.head_dim
    plain = 1.0 / model.config.rope_parameters["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
    return (plain / model.model.rotary_emb.inv_freq.double().cpu()).float()


def _type(name: str, shape: torch.Size, kind: str) -> GGMLQuantizationType:
    """Of a matrix, by its name here or in GGUF."""
    wanted = TYPES[kind][0]
    if wanted == GGMLQuantizationType.Q4_0 and ("embd" in name or "embed" in name or name.split(".")[0] in _HEADS):
        wanted = GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16 if shape[-1] % _BLOCK else wanted


_HEADS = ("output", "lm_head")


def _encoded(name: str, tensor: torch.Tensor, qtype: GGMLQuantizationType) -> np.ndarray:
    values = tensor.detach().float().cpu().contiguous().numpy()
    largest = float(np.abs(values).max())
    if not largest <= float(np.finfo(np.float16).max):  # scales of blocks are float16 too
        _refuse("find weights within the range of float16", f"{largest:.3g} in {name}", "export to safetensors")
    return values if qtype == GGMLQuantizationType.F32 else quantize(values, qtype)


def _gemma_ropes(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary settings of full and of sliding layers."""
    return config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]


def _refuse(must: str, got: Any, do: str = "export to safetensors or onnx") -> None:
    raise InputError(_WHERE, must=must, got=got, do=do)
