"""VLog: a clip is narrated by one forward pass that retrieves a whole narration from a vocabulary.

Frames are seen by a frozen image encoder, v_j [D_v]; the text query q_1 ... q_m (ended by EOS) goes through the
language model's own embeddings E. With a linear in_projector W_in (``visual_tokens`` tokens a frame, at most
``max_frames`` frames at even distances) and a retrieval token r

    x = [W_in v_1 ... W_in v_T, E q_1 ... E q_m, E eos, r],    t = W_out LM(x)_last    in R^(D_o)
    answer = argmax_i cos(t, o_i),    o_i = the frozen text encoder's vector of narration i

r is the EOS itself ("eos"), a learned vector ("learnable"), or the mean of the visual tokens ("pool"). Narrations never
pass the language model, so new ones are known as soon as their text is embedded. Training, tau = 0.05, batch B, text
pairs that are equal left out of the negatives:

    L = CE over rows + CE over columns of [cos(t_i, o_j) / tau]_ij;    a closed label set: CE over all its vectors

The same class holds the baselines: ``method`` "generative" writes narrations token by token (CE on them, given frames
and query); "mean_pool" is W_out mean_j(W_in v_j), "adapter" the same after two transformer layers over the frames;
"pool_query" is W_out of the mean over visual and query embeddings together.

Different from the paper: image and text vectors may be of unrelated encoders (W_out learns the way between them; there
is then no zero-shot baseline), losses are not gathered over processes, and each vector of a batch is read at its row's
own last place, so that padding on either side and batch size change nothing. Vocabulary, pairs, index and decoding are
``gossamer.parts.narration_index``, ``narration_pairs`` and ``narration``; rows become batches in
:class:`gossamer.architectures.vlog.processing.VLogProcessor`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

from gossamer.architectures.vlog.configuration import VLogConfig
from gossamer.architectures.vlog.modeling import VLogModel
from gossamer.architectures.vlog.processing import VLogProcessor
from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.kinds.architectures import Architecture

CARD = Card(
    title="VLog",
    paper="2503.09402",
    year=2025,
    modality=("video", "text"),
    claim="causal queries (next, previous): R@1 above both pooled retrieval baselines; a clip at least 5 times as fast "
    "as token-by-token generation with the same language model, at no lower R@1",
    traits=("converts",),
    registers=("auto:vlog",),
    limits="scores on Ego4D, COIN and EgoSchema, SigLIP's shared space and an LMM's proposals are not shown here",
)


class VLogOptions(Config):
    method: str = option(
        "vlog", "vlog, or a baseline", choices=("vlog", "generative", "mean_pool", "pool_query", "adapter")
    )
    retrieval_token: str = option("pool", "what is read at the end", choices=("eos", "learnable", "pool"))
    visual_tokens: int = option(1, "tokens a frame", ge=1)
    max_frames: int = option(128, "frames beyond this are thinned out evenly", ge=1)
    markers: bool = option(False, "learned tokens before and after the frames")
    tau: float = option(0.05, "tau of the loss", gt=0, effect="report")
    symmetric: bool = option(True, "loss over rows and columns, else over rows", effect="report")
    mask_equal: bool = option(True, "equal answers of a batch are no negatives of each other", effect="report")
    tune: str = option("full", "what is trained of the language model", choices=("full", "lora", "frozen"))
    image_width: int = option(768, "width of the image encoder's vectors", ge=1)
    text_width: int = option(384, "width of the text encoder's vectors", ge=1)
    encoder: str = option("dinov2-small+all-minilm-l6-v2", "IMAGES+TEXTS, or one CLIP-like checkpoint", effect="report")


class VLog(Architecture):
    """Built on a causal language model of any family that takes ``inputs_embeds``."""

    config_class = VLogOptions
    config: VLogOptions

    def build(self, base: Any = None) -> VLogModel:
        """A model with the weights of ``base`` and new projectors; ``base`` itself is left as it is."""
        if self.config.method == "generative" and not base.can_generate():
            raise InputError(
                "vlog.build", must="get a language model with its head for method 'generative'", got=type(base).__name__
            )
        options = {key: value for key, value in self.config.as_dict().items() if key != "encoder"}
        config = VLogConfig(copy.deepcopy(base.config), **options)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = VLogModel(config)
            # the same projectors whether or not LoRA drew its own weights in between
            torch.manual_seed(self.seed)
            model.take(base)
        return model.to(base.dtype).eval()

    def processor(self, base: Any = None) -> VLogProcessor:
        """For the tokenizer ``base``; the encoder is opened when a row needs it."""
        if base is None:
            raise InputError("vlog.processor", must="get the language model's tokenizer", got="none")
        return VLogProcessor(
            base,
            encoder_name=self.config.encoder,
            max_frames=self.config.max_frames,
            method=self.config.method,
        )


AutoConfig.register("vlog", VLogConfig, exist_ok=True)
AutoModel.register(VLogConfig, VLogModel, exist_ok=True)
AutoProcessor.register(VLogConfig, VLogProcessor, exist_ok=True)
