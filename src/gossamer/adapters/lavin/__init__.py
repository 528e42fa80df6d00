"""LaVIN: a frozen language model and a frozen vision transformer joined by mixture-of-modality adapters.

Visual input. The class token after every ``visual_every``-th block of the vision tower, X [b, n, d_v], goes through
Linear(d_v, 128) - SiLU - Linear(128, H) and takes n places of the prompt:

    <s> "Image: " [n visual tokens] instruction answer </s>        or        <s> "Image: N/A" instruction answer </s>

Adapter, on the normed input x [t, H] of each block's attention (``where: block``: and of its FFN), all linear:

    z = dropout(A x + a),   y = x + s (w_0 (B z + b) + w_1 (D z + d))     A: H -> r;  B, D: r -> H in ``groups`` blocks
    w = softmax(W_r x_0 / tau)                                            one pair a row and block

B, b, D and d start at zero, so that the model starts as it was. x_0 is the normed state of a modality token, one of two
learned embeddings, at the front of the sequence, which no other token may attend to. Its states therefore depend on the
modality alone; it runs beside the sequence here, as a batch of two rows of one token. That gives the numbers of the
masked sequence and leaves masks, caches and positions to the model.

For a fixed modality the adapter is linear: :meth:`LaVIN.merge` folds it into the query, key and value projections.
The vision tower gets adapters of the same form (``visual_adapter: router``, x_0 its class token) or with B alone.

Where this differs: the official vision router reads the first row of the batch (its layout is sequence-first); here it
reads the class token. Training settings are the recipe's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.adapters.lavin.modules import Adapter, Modules, SelfRouted, attention, before, text_blocks, vision_blocks
from gossamer.adapters.lavin.processing import LaVINProcessor
from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.kinds.adapters import ModuleAdapter
from gossamer.parts.front_end import embed_tokens

CARD = Card(
    title="Cheap and Quick: Efficient Vision-Language Instruction Tuning for Large Language Models",
    paper="2305.15023",
    year=2023,
    modality=("image", "text"),
    claim="on mixed image and text tasks, accuracy at least that of one shared adapter, with text ability kept",
    traits=("identity_at_init",),
    requires=("float_weights|quantised",),
    provides=("adapter_attached",),
    limits="ScienceQA's figures and 7B models are not shown here",
)

TEXT, SEEN = 0, 1  # modalities


class LaVINConfig(Config):
    vision: str | None = option(None, "companion that sees: a vision transformer; none for text alone", companion=True)
    dim: int = option(8, "width r of the bottleneck", ge=1)
    groups: int = option(2, "blocks of the projections out of the bottleneck; a divisor of dim", ge=1)
    scale: float = option(1.0, "s, the adapter's weight", gt=0)
    tau: float = option(10.0, "temperature of the router: 10 for question answering, 5 for chat", gt=0)
    router: bool = option(True, "two experts mixed by the modality; without, one adapter for all")
    where: str = option("attn", "before attention, or before attention and FFN", choices=("attn", "block"))
    visual_every: int = option(4, "blocks of the vision tower between two class tokens that are taken", ge=1)
    visual_adapter: str = option(
        "router", "adapters in the vision tower; they train through it", choices=("router", "normal", "none")
    )
    hidden_proj: int = option(128, "inner width of the projector", ge=1)
    dropout: float = option(0.1, "on z while training", ge=0, lt=1)


class LaVIN(ModuleAdapter):
    """``attach(lm)`` with the companion ``vision``; rows go through :meth:`processor`'s ``collate``."""

    config_class = LaVINConfig

    def modules(self, model: nn.Module) -> Modules:
        config = self.config
        blocks = text_blocks(model, self.name)
        width = int(model.get_input_embeddings().embedding_dim)  # type: ignore[operator]
        vision = self.companion(config.vision) if config.vision else None
        widths = [width] + ([int(vision.config.hidden_size)] if vision is not None else [])
        if config.dim % config.groups or any(size % config.groups for size in widths):
            raise InputError(
                f"{self.name}.groups", must=f"divide dim ({config.dim}) and the widths {widths}", got=config.groups
            )
        made = Modules(len(blocks), width, vision, config)
        if vision is not None:
            if self._visual_layers(vision) == []:
                raise InputError(
                    f"{self.name}.visual_every",
                    must=f"be at most the {len(vision_blocks(vision))} blocks of the vision tower",
                    got=config.visual_every,
                )
            made.projector.match(model)
        with torch.no_grad():
            if made.modality is not None:
                table = embed_tokens(model, torch.arange(64, device=next(model.parameters()).device))
                made.modality.weight.mul_(table.float().square().mean().sqrt().item())
        return made.to(next(model.parameters()).device)

    def hook(self, model: nn.Module, modules: Any) -> list[Any]:
        self._pass = _Pass()
        handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        handles += self._text_hooks(model, modules)
        vision = self.companion(self.config.vision) if self.config.vision else None
        if vision is not None:
            self._vision_trained = [parameter for parameter in vision.parameters() if parameter.requires_grad]
            vision.requires_grad_(False)
            for block, adapter in zip(vision_blocks(vision), modules.vision, strict=False):
                handles.append(before(attention(block), SelfRouted(adapter)))
        return handles

    def _text_hooks(self, model: nn.Module, modules: Any) -> list[Any]:
        """Each block's adapters in front of its attention, and of its FFN."""
        handles = []
        for index, block in enumerate(text_blocks(model, self.name)):
            handles.append(before(block.self_attn, _TextHook(self, model, modules.attn[index], index)))
            if len(modules.ffn):
                handles.append(before(block.mlp, _TextHook(self, model, modules.ffn[index], len(modules.attn) + index)))
        return handles

    def detach(self, model: Any) -> Any:
        for parameter in getattr(self, "_vision_trained", []):
            parameter.requires_grad_(True)
        return super().detach(model)

    def visual_features(self, pixel_values: Tensor) -> Tensor:
        """Class tokens [b, n, d_v] of images [b, 3, h, w]; with gradients only where the tower has adapters."""
        vision = self.companion(self.config.vision)
        learns = torch.is_grad_enabled() and self.config.visual_adapter != "none"
        with torch.set_grad_enabled(learns):
            states = vision(pixel_values=pixel_values.to(next(vision.parameters())), output_hidden_states=True)
        taken = [states.hidden_states[layer][:, 0] for layer in self._visual_layers(vision)]
        return torch.stack(taken, dim=1)

    @property
    def visual_length(self) -> int:
        """n, the visual tokens of one image."""
        return len(self._visual_layers(self.companion(self.config.vision))) if self.config.vision else 0

    def _visual_layers(self, vision: nn.Module) -> list[int]:
        """Numbers of blocks done when a class token is taken; hidden_states[0] is before the first."""
        every = self.config.visual_every
        return list(range(every, len(vision_blocks(vision)) + 1, every))

    def processor(self, base: Any, image_size: int | None = None) -> LaVINProcessor:
        """Rows to batches of the attached model, around its tokenizer ``base``.

        Images are ``image_size`` pixels a side; by default as the vision tower has them, at most 224.
        """
        if image_size is None and self.config.vision:
            image_size = min(224, int(getattr(self.companion(self.config.vision).config, "image_size", 224)))
        return LaVINProcessor(base, self.visual_length, image_size or 224)

    @contextlib.contextmanager
    def reading(self, model: Any, modality: Tensor) -> Iterator[None]:
        """Inside, calls that name no modality (those of ``generate``) have this one, int [b]."""
        self._pass.default = modality
        try:
            yield
        finally:
            self._pass.default = None

    @torch.no_grad()
    def generate(self, model: Any, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
        """New tokens [b, t] for the prompts of a batch that the processor made with ``prompts``."""
        embeds = self._embedded(model, dict(batch))
        with self.reading(model, batch["modality"]):
            return model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options)

    @torch.no_grad()
    def routes(self, model: Any) -> Tensor:
        """w [adapters, modality, 2]: what each block mixes for text and for images."""
        return torch.stack(self._routes(model))

    @torch.no_grad()
    def merge(self, model: Any, modality: str = "text") -> Any:
        """The plain model for rows of one modality ("text" or "image"): q, k, v get (I + M) and a bias.

        Exact in float32; with ``where: block`` the gate and up projections are folded too. The projector and visual
        adapters are gone then, so that "image" is for callers who embed images themselves.
        """
        if modality not in ("text", "image"):
            raise InputError(f"{self.name}.merge", must="name text or image", got=repr(modality))
        modules = getattr(model, self.slot)
        routes = self._routes(model) if self.config.router else None
        blocks = text_blocks(model, self.name)
        folded = []
        for index, adapter in enumerate([*modules.attn, *modules.ffn]):
            row = None if routes is None else routes[index][SEEN if modality == "image" else TEXT]
            folded.append(adapter.linear(row))
        self.detach(model)
        for index, (matrix, bias) in enumerate(folded):
            block = blocks[index % len(blocks)]
            attention = index < len(blocks)
            names = ("q_proj", "k_proj", "v_proj") if attention else ("gate_proj", "up_proj")
            for name in names:
                _fold(getattr(block.self_attn if attention else block.mlp, name), matrix, bias, self.name)
            _zero_bias(block.self_attn.o_proj if attention else block.mlp.down_proj)
        # the config says so, or a reloaded model would have no place for the biases
        model.config.attention_bias = True
        if modules.ffn:
            model.config.mlp_bias = True
        return model

    def _begin(self, model: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before the language model: visual tokens into their places, and w for each row."""
        state = self._pass
        if state.side:
            return args, kwargs
        modality = kwargs.pop("modality", state.default)
        if kwargs.get("visual") is not None:
            kwargs["inputs_embeds"] = self._embedded(model, {**kwargs, "input_ids": kwargs.pop("input_ids")})
            args = ()
        for name in ("visual", "pixel_values", "features"):
            kwargs.pop(name, None)
        first = next(
            value for value in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if value is not None
        )
        rows = first.shape[0]
        if modality is None:
            modality = torch.zeros(rows, dtype=torch.long, device=first.device)
        if rows != len(modality):  # beams, or several answers a prompt
            modality = modality.repeat_interleave(rows // len(modality))
        if self.config.router:
            state.routes = [table[modality] for table in self._routes(model)]
        return args, kwargs

    def _end(self, model: Any, args: Any, output: Any) -> Any:
        """After it: the weights of this pass are forgotten."""
        if not self._pass.side:
            self._pass.routes = []

    def _embedded(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Token embeddings [b, t, H] with the visual tokens in their places."""
        embeds = embed_tokens(model, batch["input_ids"])
        visual = batch.get("visual")
        if visual is None or not bool(visual.any()):
            return embeds
        features = batch.get("features")
        if features is None:
            features = self.visual_features(batch["pixel_values"])
        projector = getattr(model, self.slot).projector
        tokens = projector(features.to(next(projector.parameters())))
        return embeds.masked_scatter(visual.unsqueeze(-1), tokens.to(embeds.dtype))

    def _routes(self, model: Any) -> list[Tensor]:
        """For each adapter w [2, 2] by modality, from the modality tokens' own run through the model."""
        modules, state = getattr(model, self.slot), self._pass
        # what is learned changes between two passes of training only
        key = None if torch.is_grad_enabled() else tuple(parameter._version for parameter in modules.parameters())
        if key is not None and key == state.key:
            return state.known
        state.side, state.routes = True, [None] * (len(modules.attn) + len(modules.ffn))
        try:
            tokens = modules.modality.weight[:, None].to(next(model.parameters()).dtype)
            model.get_decoder()(inputs_embeds=tokens, use_cache=False)
            found: list[Tensor] = list(state.routes)
        finally:
            state.side, state.routes = False, []
        state.key, state.known = key, found
        return found


class _Pass:
    """What the hooks of one forward pass share."""

    def __init__(self) -> None:
        self.side = False  # the modality tokens are running
        self.routes: list[Any] = []
        self.default: Tensor | None = None
        self.key: tuple[int, ...] | None = None
        self.known: list[Tensor] = []


class _TextHook:
    def __init__(self, owner: LaVIN, model: Any, adapter: Adapter, index: int) -> None:
        self.owner, self.model, self.adapter, self.index = owner, model, adapter, index

    def __call__(self, x: Tensor) -> Tensor:
        state = self.owner._pass
        if self.adapter.router is None:
            return self.adapter(x, None)
        if state.side:
            state.routes[self.index] = self.adapter.routes(x[:, 0].to(self.adapter.down.weight))
        elif not state.routes:  # the decoder is called by itself: text
            state.routes = [table[TEXT].expand(len(x), -1) for table in self.owner._routes(self.model)]
        return self.adapter(x, state.routes[self.index])


def _fold(layer: nn.Linear, matrix: Tensor, bias: Tensor, name: str) -> None:
    """W (I + M) and W c + b, for y = W ((I + M) x + c) + b."""
    if type(layer) is not nn.Linear:
        raise InputError(
            f"{name}.merge", must="find float projections", got=type(layer).__name__, do="keep the adapter"
        )
    weight = layer.weight.float()
    shift = weight @ bias.to(weight)
    before = layer.bias.float() if layer.bias is not None else torch.zeros_like(shift)
    layer.bias = nn.Parameter((shift + before).to(layer.weight.dtype), requires_grad=False)
    layer.weight.copy_((weight + weight @ matrix.to(weight)).to(layer.weight.dtype))


def _zero_bias(layer: nn.Linear) -> None:
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features), requires_grad=False)
