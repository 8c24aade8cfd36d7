"""Workers that run and are not heard of: counted by the server's answers, started again by `popalign up`."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows import watchdog
from flows.processes import Child
from flows.watchdog import CHECKS, FIRST_CHECKS, Watchdog

Answers = dict[str, str]


@pytest.fixture
def answers() -> Answers:
    return {}


@pytest.fixture
def port(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server that answers, for the CPU pool, with the workers and states of `answers`."""

    class Pools(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            mine = "popalign-cpu" in self.path
            self.send_response(200)
            self.end_headers()
            workers = [{"name": name, "status": status} for name, status in answers.items()] if mine else []
            self.wfile.write(json.dumps(workers).encode())

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(watchdog, "CHECK_SECONDS", 0.0)
    with HTTPServer(("127.0.0.1", 0), Pools) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_only_who_is_offline_at_every_check_is_silent(port: int, answers: Answers) -> None:
    watching = Watchdog(port)
    answers |= {"cpu": "OFFLINE", "gpu": "ONLINE"}
    assert [watching.silent() for _ in range(CHECKS)] == [set()] * (CHECKS - 1) + [{"cpu"}]
    assert watching.silent() == set()  # it gets the time to start
    answers["cpu"] = "ONLINE"
    watching.silent()
    answers["cpu"] = "OFFLINE"
    assert [watching.silent() for _ in range(CHECKS - 1)] == [set()] * (CHECKS - 1)


def test_a_worker_that_was_never_heard_of_is_silent_in_the_end(port: int, answers: Answers) -> None:
    answers["gpu"] = "ONLINE"
    watching = Watchdog(port, ["cpu", "gpu"])
    assert [watching.silent() for _ in range(FIRST_CHECKS)] == [set()] * (FIRST_CHECKS - 1) + [{"cpu"}]
    answers["cpu"] = "ONLINE"
    assert not any(watching.silent() for _ in range(FIRST_CHECKS + 1))


def test_a_server_that_does_not_answer_makes_nobody_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "CHECK_SECONDS", 0.0)
    watching = Watchdog(1)
    assert {frozenset(watching.silent()) for _ in range(CHECKS + 1)} == {frozenset()}


def test_it_asks_only_now_and_then(port: int, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "CHECK_SECONDS", 60.0)
    answers["cpu"] = "OFFLINE"
    watching = Watchdog(port)
    assert not any(watching.silent() for _ in range(CHECKS))


def test_a_silent_worker_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.processes.services_folder", lambda: tmp_path)
    monkeypatch.setattr("flows.processes.FIRST_PAUSE", 0.0)
    said: list[str] = []
    child = Child("cpu-here", [sys.executable, "-c", "import time; time.sleep(600)"], {}, tmp_path)
    child.start()
    first = child.pid
    child.kill_silent(said.append)
    while not child.revive(said.append):
        pass
    assert child.pid != first
    assert not child.death()
    child.kill_silent(said.append)
    assert "has not heard of it for minutes" in said[0]
