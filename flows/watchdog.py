"""Workers that run and say nothing more: their event loop hangs, as one did in a test, within anyio."""

import json
import time
from collections import Counter
from http.client import HTTPException
from urllib.request import ProxyHandler, Request, build_opener

from flows.pools import CPU_POOL, GPU_POOL
from flows.services import HOST

CHECK_SECONDS = 20.0
# A worker is offline to the server when three signs of life are missing (90 s); after an absence of the server all are.
CHECKS = 4


class Watchdog:
    """Asks the server now and then which workers it has not heard of."""

    def __init__(self, port: int):
        self._port = port
        self._asked = time.monotonic()
        self._missed: Counter[str] = Counter()

    def silent(self) -> set[str]:
        """Names of workers that were offline at each of the last checks; they are counted anew from then on."""
        if time.monotonic() - self._asked < CHECK_SECONDS:
            return set()
        self._asked = time.monotonic()
        offline = self._offline()
        self._missed = Counter({name: self._missed[name] + 1 for name in offline})
        silent = {name for name, missed in self._missed.items() if missed >= CHECKS}
        for name in silent:
            del self._missed[name]
        return silent

    def _offline(self) -> set[str]:
        """Nobody where the server does not answer: then it is the server that is missing."""
        opener = build_opener(ProxyHandler({}))
        found: set[str] = set()
        for pool in (CPU_POOL, GPU_POOL):
            url = f"http://{HOST}:{self._port}/api/work_pools/{pool}/workers/filter"
            request = Request(url, data=b"{}", headers={"Content-Type": "application/json"}, method="POST")
            try:
                with opener.open(request, timeout=5) as answer:
                    found |= {worker["name"] for worker in json.load(answer) if worker["status"] == "OFFLINE"}
            except (OSError, HTTPException, ValueError):
                return set()
        return found
