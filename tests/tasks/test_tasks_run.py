"""The start of a run."""

from tasks.run import record_run, reference


def test_a_start_removes_what_a_crash_left(written_run) -> None:
    """Also the timing of work that is committed, which nobody writes again."""
    half = reference(written_run.workspace, written_run.run_id, "timings", "attributes-shard")
    half.folder.mkdir(parents=True)
    (half.folder / "timings.parquet").write_bytes(b"half")
    for _ in range(2):
        record_run(written_run.workspace, written_run.run_id, "emoji", written_run.config)
        assert not half.folder.exists()
