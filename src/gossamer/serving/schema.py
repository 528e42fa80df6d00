"""The requests of the OpenAI API that this server takes. A field that it cannot honour is refused, never ignored.

Fields of the API that are not offered are named here with the values that ask for nothing (null, false, "auto" ...), so
that clients which always send them work and a wish for more gets an error that names the field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _unicode(text: str) -> str:
    """JSON can write halves of surrogate pairs, which are no characters."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("must hold whole characters, got half of a surrogate pair")
    return text


MOST_CHOICES = 128
MOST_LOGPROBS = 20
_NOT_OFFERED = "Not offered: only what asks for nothing is taken."

TokenId = Annotated[int, Field(ge=0, le=2**31)]
AnyText = Annotated[str, AfterValidator(_unicode)]
Text = Annotated[AnyText, Field(min_length=1)]
Stop = Annotated[AnyText, Field(min_length=1, max_length=256)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]


Off = Field(description=_NOT_OFFERED)
Nothing = Annotated[None, Off]
NoItems = Annotated[list[Any], Field(max_length=0), Off]


class Strict(BaseModel):
    """No unknown fields, no numbers as strings, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: AnyText


class Message(Strict):
    """A turn. What an answer of this server holds besides its text may be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: AnyText | Annotated[list[TextPart], Field(min_length=1)]
    name: Nothing = None
    refusal: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Nothing = None
    annotations: Annotated[NoItems | None, Off] = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Literal[False] | None, Off] = None


class JsonSchema(Strict):
    """``strict`` false asks for less than what is always done: the answer fits the schema."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Strict):
    """An extension: the answer matches ``pattern`` as a whole."""

    type: Literal["regex"]
    pattern: Text


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat | RegexFormat, Field(discriminator="type")]


class Extension(Strict):
    """Of this server: ``stages`` switches stages off, by name."""

    stages: dict[str, bool] = Field(default_factory=dict)


class Generation(Strict):
    """What chats and completions share."""

    model: str
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    user: Annotated[str, Field(max_length=256, description="Written to the log of requests.")] | None = None
    top_k: Annotated[int, Field(ge=1, description="An extension: only so many tokens are drawn from.")] | None = None
    guided_regex: Annotated[Text, Field(description="An extension: as response_format regex.")] | None = None
    gossamer: Extension | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: Format | None = None
    audio: Nothing = None
    function_call: Annotated[Literal["none"] | None, Off] = None
    functions: Annotated[NoItems | None, Off] = None
    metadata: Nothing = None
    modalities: Annotated[list[Literal["text"]] | None, Field(min_length=1, max_length=1), Off] = None
    parallel_tool_calls: Annotated[bool | None, Off] = None
    prediction: Nothing = None
    prompt_cache_key: Nothing = None
    prompt_cache_retention: Nothing = None
    reasoning_effort: Annotated[Literal["none"] | None, Off] = None
    safety_identifier: Nothing = None
    service_tier: Annotated[Literal["auto", "default"] | None, Off] = None
    store: Annotated[Literal[False] | None, Off] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, Off] = None
    tools: Annotated[NoItems | None, Off] = None
    verbosity: Nothing = None
    web_search_options: Nothing = None


class CompletionRequest(Generation):
    prompt: (
        AnyText | Annotated[list[AnyText], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES, description="Must equal n.")] | None = None
    suffix: Nothing = None


class EmbeddingRequest(Strict):
    model: str
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=2048)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Nothing = None
    user: Annotated[str, Field(max_length=256)] | None = None


def not_offered() -> set[str]:
    """Names of the fields that are taken only with a value that asks for nothing."""
    models: list[type[BaseModel]] = [Message, StreamOptions, ChatRequest, CompletionRequest, EmbeddingRequest]
    fields = [item for model in models for item in model.model_fields.items()]
    return {name for name, field in fields if field.description == _NOT_OFFERED}
