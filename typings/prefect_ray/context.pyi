from contextlib import AbstractContextManager
from typing import Any

def remote_options(**new_remote_options: Any) -> AbstractContextManager[None]: ...
