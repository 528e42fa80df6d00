"""An OpenAI-compatible server over the decoding runner: see :mod:`gossamer.serving.app` and ``docs/guide/serve.md``.

engine.py      continuous batching on a thread of its own; sequences.py, stepping.py, prefixes.py, text.py,
               sampling.py and stages.py are its pieces
app.py         the FastAPI application; schema.py, replies.py, asks.py, events.py, errors.py, limits.py, metrics.py
server.py      the socket, signals and the end
"""
