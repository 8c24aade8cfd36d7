"""Workers that run and say nothing more: their event loop hangs, as one did in a test, within anyio."""

import json
import time
from collections import Counter
from collections.abc import Collection
from http.client import HTTPException
from urllib.request import ProxyHandler, Request, build_opener

from flows.pools import CPU_POOL, GPU_POOL
from flows.services import HOST

CHECK_SECONDS = 20.0
# A worker is offline to the server when three signs of life are missing (90 s); after an absence of the server all are.
CHECKS = 4
# One that hung before it was heard of at all is in no list; on a busy machine a worker takes a minute to start.
FIRST_CHECKS = 12


class Watchdog:
    """Asks the server now and then which workers it has not heard of. workers: names of those that there should be."""

    def __init__(self, port: int, workers: Collection[str] = ()):
        self._port, self._workers = port, workers
        self._asked = time.monotonic()
        self._missed: Counter[str] = Counter()

    def silent(self) -> set[str]:
        """Names of workers that were offline, or unknown, at each of the last checks; they are counted anew then."""
        if time.monotonic() - self._asked < CHECK_SECONDS:
            return set()
        self._asked = time.monotonic()
        known = self._known()
        if known is None:  # then it is the server that is missing
            self._missed.clear()
            return set()
        offline = {name for name, online in known.items() if not online}
        unknown = set(self._workers) - known.keys()
        self._missed = Counter({name: self._missed[name] + 1 for name in offline | unknown})
        silent = {
            name for name, missed in self._missed.items() if missed >= (FIRST_CHECKS if name in unknown else CHECKS)
        }
        for name in silent:
            del self._missed[name]
        return silent

    def _known(self) -> dict[str, bool] | None:
        """Whether each worker that the server knows is online; None where the server does not answer."""
        opener = build_opener(ProxyHandler({}))
        found: dict[str, bool] = {}
        for pool in (CPU_POOL, GPU_POOL):
            url = f"http://{HOST}:{self._port}/api/work_pools/{pool}/workers/filter"
            request = Request(url, data=b"{}", headers={"Content-Type": "application/json"}, method="POST")
            try:
                with opener.open(request, timeout=5) as answer:
                    found |= {worker["name"]: worker["status"] != "OFFLINE" for worker in json.load(answer)}
            except (OSError, HTTPException, ValueError):
                return None
        return found
