"""Acceleration: fewer tokens, layers or context a step."""
