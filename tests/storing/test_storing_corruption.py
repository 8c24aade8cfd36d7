"""Damage is found: by hash in `verify`, by checksum and structure when reading."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.artifacts import ArtifactRef, committed_keys, read_manifest, verify
from storage.catalog import rebuild_catalog
from storage.commit import staged_artifact
from storage.errors import CorruptArtifact, NotCommitted, SchemaMismatch, StorageError, WorkspaceTooNew
from storage.layout import Workspace
from storage.tables import read_artifact, read_images, read_rows, write_rows

IMAGES = [{"sample_id": f"base/p/{index}", "image": bytes([index]) * 40, "format": "webp"} for index in range(3)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> ArtifactRef:
    """A committed artifact whose files every test puts back."""
    root = Workspace.open(tmp_path_factory.mktemp("damaged")).root
    ref = ArtifactRef(str(root), "night-1", "samples", "shard-0")
    with staged_artifact(ref) as folder:
        write_rows(folder, "images", IMAGES)
        (folder / "weights").mkdir()
        (folder / "weights" / "model.safetensors").write_bytes(bytes(range(200)))
    return ref


@pytest.fixture
def replaced():
    """Writes other content into a file for one test."""
    before: dict = {}

    def replace(path, content: bytes):
        before.setdefault(path, path.read_bytes())
        path.write_bytes(content)

    yield replace
    for path, content in before.items():
        path.write_bytes(content)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found_by_its_hash(damaged, replaced, data):
    name = data.draw(st.sampled_from(sorted(read_manifest(damaged).files)))
    path = damaged.folder / name
    original = path.read_bytes()
    content = bytearray(original)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    replaced(path, bytes(content))
    with pytest.raises(CorruptArtifact) as caught:
        verify(damaged)
    assert str(path) in str(caught.value)
    replaced(path, original)
    verify(damaged)


def test_a_flipped_bit_in_an_image_is_found_when_it_is_read(damaged, replaced):
    path = damaged.folder / "images.parquet"
    content = bytearray(path.read_bytes())
    content[content.index(bytes([2]) * 40) + 7] ^= 1
    replaced(path, bytes(content))
    workspace = Workspace.open(damaged.workspace)
    for read in (
        lambda: read_rows(workspace, "night-1", "images"),
        lambda: read_artifact(damaged, "images"),
        lambda: read_images(workspace, "night-1", ["base/p/2"]),
    ):
        with pytest.raises(CorruptArtifact, match=r"images\.parquet is not readable.*Remove .*shard-0"):
            read()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_parquet_is_named(damaged, replaced, share):
    path = damaged.folder / "images.parquet"
    content = path.read_bytes()
    replaced(path, content[: int(share * len(content))])
    workspace = Workspace.open(damaged.workspace)
    for read in (
        lambda: read_rows(workspace, "night-1", "images"),
        lambda: read_images(workspace, "night-1", ["base/p/2"]),
        lambda: verify(damaged),
        lambda: rebuild_catalog(workspace),
    ):
        with pytest.raises(CorruptArtifact, match=r"images\.parquet"):
            read()


@pytest.mark.parametrize(
    "content", [b"", b'{"files": {"images.par', b"[]", b"{}", b'{"files": {"a": 1}, "facts": {}}', b"\xff"]
)
def test_a_damaged_manifest_is_named(damaged, replaced, content):
    replaced(damaged.folder / "manifest.json", content)
    with pytest.raises(CorruptArtifact, match=r"manifest\.json is not a manifest.*remove"):
        read_manifest(damaged)


def test_a_missing_file_is_named(damaged, replaced):
    path = damaged.folder / "weights" / "model.safetensors"
    replaced(path, path.read_bytes())
    path.unlink()
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors is missing"):
        verify(damaged)


def test_what_was_never_committed_is_told_from_what_is_damaged(workspace, ref):
    with pytest.raises(NotCommitted):
        verify(ref)
    with pytest.raises(NotCommitted, match="no committed timings"):
        read_artifact(ref, "timings")
    ref.folder.mkdir(parents=True)
    write_rows(ref.folder, "timings", [])
    with pytest.raises(NotCommitted, match="no committed timings"):
        read_artifact(ref, "timings")
    assert committed_keys(workspace, "night-1", "timings") == []
    assert read_rows(workspace, "night-1", "timings") == []


def test_errors_of_reading_are_storage_errors():
    assert all(issubclass(kind, StorageError) for kind in (CorruptArtifact, SchemaMismatch, WorkspaceTooNew))
