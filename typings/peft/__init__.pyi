"""Untyped on purpose: the library wraps modules whose types it does not keep."""

from typing import Any

def __getattr__(name: str) -> Any: ...
