"""What a run on Ray says where there is no Ray, or no cluster; and who makes a shard that somebody else is at."""

import socket
import sys
import time
from pathlib import Path

import pytest
from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.cluster import claiming, run_on_cluster
from flows.placement import run_shards
from popalign_core.errors import InvalidInput
from popalign_core.execution import Execution
from storage.artifacts import ArtifactRef
from storage.locks import claimed

ADDRESS = "execution.ray_address"


@task(cache_policy=NO_CACHE)
def never(ref: ArtifactRef) -> ArtifactRef:
    raise AssertionError(ref)


@pytest.fixture
def shard(tmp_path: Path) -> ArtifactRef:
    return ArtifactRef(str(tmp_path), "r", "samples", "base.evaluation.00000")


def test_without_ray_it_says_what_to_install(shard: ArtifactRef, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(InvalidInput, match=r"prefect-ray is not installed: pip install 'popalign\[ray\]'"):
        run_shards(never, [shard], Execution(placement="ray"))


def test_an_address_where_nobody_answers_says_how_to_start_a_cluster(shard: ArtifactRef) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: refused at once
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(InvalidInput, match=f"answers at {ADDRESS}={address} .*`ray start --head`"):
            run_shards(never, [shard], Execution(placement="ray", ray_address=address))
    assert time.monotonic() - started < 10  # Ray itself would try for two minutes


@pytest.mark.parametrize("address", ["cluster", "ray://cluster", "127.0.0.1:", "127.0.0.1:seven"])
def test_an_address_without_a_port_is_refused(shard: ArtifactRef, address: str) -> None:
    with pytest.raises(InvalidInput, match=f"{ADDRESS}={address} "):
        run_shards(never, [shard], Execution(placement="ray", ray_address=address))


def test_without_shards_no_cluster_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    run_on_cluster(never, [], Execution(placement="ray"), (), lambda _: None)


def test_a_process_of_the_cluster_leaves_alone_what_another_one_is_at(shard: ArtifactRef) -> None:
    """`claimed` is held by open file, so one process can play both."""
    shared = claiming(never)
    with claimed(shard) as mine:
        assert mine
        assert shared.fn(shard) == shard
    with pytest.raises(AssertionError, match=shard.key):
        shared.fn(shard)
    assert never.fn is not shared.fn
