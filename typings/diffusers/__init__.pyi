"""Untyped on purpose: the library's own annotations are too narrow (a tuple of one integer for a tuple of levels)."""

from typing import Any

def __getattr__(name: str) -> Any: ...
