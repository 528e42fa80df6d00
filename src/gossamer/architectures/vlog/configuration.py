"""Shape, method and loss of a VLog, as its config.json keeps them."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from gossamer.core.errors import OptionError

METHODS = ("vlog", "generative", "mean_pool", "pool_query", "adapter")
RETRIEVAL_TOKENS = ("eos", "learnable", "pool")
TUNE = ("full", "lora", "frozen")


class VLogConfig(PretrainedConfig):
    """Shape, method, loss, and the thresholds of narrating.

    ``oov_threshold`` and ``postfix_threshold`` are cosines: below the first a clip is out of
    vocabulary, below the second no postfix is added; None for no threshold.
    """

    model_type = "vlog"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        *,
        image_width: int = 768,
        text_width: int = 384,
        method: str = "vlog",
        retrieval_token: str = "pool",
        visual_tokens: int = 1,
        max_frames: int = 128,
        markers: bool = False,
        tau: float = 0.05,
        symmetric: bool = True,
        mask_equal: bool = True,
        tune: str = "full",
        oov_threshold: float | None = None,
        postfix_threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value, choices in (
            ("method", method, METHODS), ("retrieval_token", retrieval_token, RETRIEVAL_TOKENS), ("tune", tune, TUNE),
        ):  # fmt: skip
            if value not in choices:
                raise OptionError(f"vlog.{name}", must=f"be one of {choices}", got=repr(value))
        if text_config is None:
            text_config = AutoConfig.for_model("gpt2")
        elif isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.image_width, self.text_width = image_width, text_width
        self.method, self.retrieval_token, self.visual_tokens = method, retrieval_token, visual_tokens
        self.max_frames, self.markers = max_frames, markers
        self.tau, self.symmetric, self.mask_equal = tau, symmetric, mask_equal
        self.tune = tune
        self.oov_threshold, self.postfix_threshold = oov_threshold, postfix_threshold
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        return self.text_config
