"""A client that holds the catalog, or the lock of its making, neither stops a run nor sees half of one."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.artifacts import ArtifactRef
from storage.catalog import query, rebuild_catalog
from storage.commit import staged_artifact
from storage.errors import QueryFailed
from storage.layout import Workspace
from storage.locks import exclusive
from storage.tables import write_rows

COUNT = "SELECT count(*) AS n FROM timings"
# An analyst's own session, in the middle of a change that it has not committed.
CLIENT = """
import duckdb, sys
connection = duckdb.connect(sys.argv[1])
connection.execute("BEGIN")
connection.execute("CREATE TABLE mine AS SELECT 1 AS a")
print("holding", flush=True)
sys.stdin.read()
"""


def commit(place: Workspace, key: str) -> None:
    ref = ArtifactRef(str(place.root), "night", "timings", key)
    row = {"run_id": "night", "stage": "sampling", "key": key, "seconds": 1.0, "items": 1, "device": "cpu"}
    with staged_artifact(ref) as folder:
        write_rows(folder, "timings", [row])


@contextmanager
def held_by_another_process(catalog: Path) -> Iterator[None]:
    command = [sys.executable, "-c", CLIENT, str(catalog)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stdout.readline() == "holding\n"
        yield
        client.stdin.close()


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    workspace = Workspace.open(tmp_path)
    commit(workspace, "a")
    rebuild_catalog(workspace)
    return workspace


def test_a_client_that_writes_into_the_catalog_does_not_stop_a_run(place: Workspace) -> None:
    with held_by_another_process(place.catalog):
        with pytest.raises(QueryFailed, match="lock"):
            query(place, COUNT)
        commit(place, "b")
        rebuild_catalog(place)
        assert query(place, COUNT).to_pylist() == [{"n": 2}]
    assert query(place, COUNT).to_pylist() == [{"n": 2}]


def test_a_catalog_that_another_makes_is_waited_for(place: Workspace) -> None:
    commit(place, "b")
    second = threading.Thread(target=rebuild_catalog, args=(place,))
    with exclusive(place.root / ".catalog.lock"):
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert query(place, COUNT).to_pylist() == [{"n": 1}]  # a reader waits for nobody
    second.join(30)
    assert query(place, COUNT).to_pylist() == [{"n": 2}]
