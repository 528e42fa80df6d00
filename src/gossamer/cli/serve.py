"""Serve a model, or the result of a run, by the OpenAI API: chat completions, completions, embeddings."""

from __future__ import annotations

import typer


def command(
    model: str = typer.Argument(help="A name, folder, hub id or the folder of a run."),
    stage: list[str] = typer.Option([], "--stage", help="NAME[:key=value,...]: a decoding system or guard."),  # noqa: B008
    host: str = typer.Option("127.0.0.1", "--host", help="Address; any but loopback needs a token."),
    port: int = typer.Option(8000, "--port", min=0, max=65535, help="0 takes a free one."),
    token: str = typer.Option("", "--token", envvar="GOSSAMER_TOKEN", help="What clients must give as bearer token."),
    name: str = typer.Option("", "--name", help="What requests call the model; by default its own name."),
    beside: str = typer.Option("", "--beside", help="A second model to serve, e.g. the untouched one, without stages."),
    embeddings: str = typer.Option("", "--embeddings", help="An encoder for /v1/embeddings, e.g. all-minilm-l6-v2."),
    pooling: str = typer.Option("mean", "--pooling", help="Embeddings of the served model: mean or last."),
    weights: str = typer.Option("stored", "--weights", help="stored, float32, bfloat16, int8 or int4."),
    max_length: int = typer.Option(0, "--max-length", min=0, help="Tokens of a prompt and its answer; 0: the model's."),
    slots: int = typer.Option(8, "--slots", min=1, help="Answers that are written at once."),
    queue: int = typer.Option(64, "--queue", min=0, help="Answers that may wait; beyond them 429."),
    prefix_tokens: int = typer.Option(16384, "--prefix-tokens", min=0, help="Tokens of finished requests to keep."),
    body_bytes: int = typer.Option(4 * 2**20, "--body-bytes", min=1, help="Largest body; beyond it 413."),
    prompt_tokens: int = typer.Option(
        0, "--prompt-tokens", min=0, help="Longest prompt; 0: what the model has room for."
    ),
    requests: int = typer.Option(256, "--requests", min=1, help="Requests under way at once; beyond them 429."),
    seconds: float = typer.Option(300.0, "--seconds", min=0.1, help="Time of a request, then 504."),
    log_bodies: bool = typer.Option(False, "--log-bodies", help="Write what is asked to the log."),
) -> None:
    from gossamer.cli._models import load_any
    from gossamer.core.errors import MissingExtra

    try:
        from gossamer.serving.engine import Capacity
        from gossamer.serving.limits import Settings
        from gossamer.serving.start import Served, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise MissingExtra("gossamer serve", "serve") from error
    settings = Settings(
        token=token or None,
        body_bytes=body_bytes,
        prompt_tokens=prompt_tokens or None,
        requests=requests,
        seconds=seconds,
        log_bodies=log_bodies,
    )
    runner = {"weights": weights, "max_length": max_length or None}
    served = Served(model, tuple(stage), name, beside, embeddings, pooling, runner)
    serve(served, settings, Capacity(slots, queue, prefix_tokens), host, port, load_any)
