"""Procedural worlds: pictures and videos made from scene graphs, so that every fact in them is known exactly."""
