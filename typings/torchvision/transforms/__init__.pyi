"""Untyped on purpose: the library's functions are annotated in part."""

from typing import Any

def __getattr__(name: str) -> Any: ...
