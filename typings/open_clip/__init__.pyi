"""Untyped on purpose: the library has no annotations that hold (a transform is a tuple of transforms)."""

from typing import Any

def __getattr__(name: str) -> Any: ...
