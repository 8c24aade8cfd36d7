"""Untyped on purpose: the library's loaders and calls are annotated in part."""

from typing import Any

def __getattr__(name: str) -> Any: ...
