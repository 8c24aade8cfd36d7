"""What a benchmark measured comes back from its table, and the page shows what was measured last."""

import json

import pytest

from popalign_core.errors import InvalidInput
from storage.layout import Workspace
from storage.tables import read_rows
from tasks import benchmarks
from tasks.benchmarks import BEGIN, END, WORKSPACE_VARIABLE, performance_table, record_benchmark


@pytest.fixture
def place(tmp_path, monkeypatch) -> Workspace:
    monkeypatch.setenv(WORKSPACE_VARIABLE, str(tmp_path / "bench"))
    return Workspace.open(tmp_path / "bench")


def rows_of(place: Workspace) -> list[dict]:
    return [row for run_id in place.run_ids() for row in read_rows(place, run_id, "benchmarks")]


def test_a_result_is_the_median_and_its_ratio_pairs_repetitions(place, capsys):
    # By hand: 2/1, 6/2, 4/4 times as good; the ratio of the medians would be 2 as well with 2, 6, 3.
    ratio = record_benchmark("drawing", [1.0, 2.0, 4.0], "s", peer=[2.0, 6.0, 4.0], peer_name="one by one",
                             settings={"images": 8})  # fmt: skip
    (row,) = rows_of(place)
    assert ratio == row["ratio"] == 2.0
    assert (row["ours"], row["peer"], row["repetitions"], row["spread"]) == (2.0, 4.0, 3, pytest.approx(1.0))
    assert json.loads(row["settings_json"]) == {"images": 8}
    assert "torch" in json.loads(row["versions_json"])
    assert row["device"]
    assert row["driver"] == ""
    assert "drawing: 2 s, 2 times as good as one by one (4), n = 3" in capsys.readouterr().out


def test_of_rates_more_is_better_and_without_a_peer_there_is_no_ratio(place):
    assert record_benchmark("rate", [30.0], "images/s", peer=[10.0]) == 3.0
    assert record_benchmark("seconds", [30.0], "s/image", peer=[10.0]) == pytest.approx(1 / 3)
    assert record_benchmark("alone", [3.0, 4.0], "GiB") is None
    alone = next(row for row in rows_of(place) if row["name"] == "alone")
    assert (alone["ratio"], alone["peer"], alone["ours"]) == (None, None, 3.5)
    with pytest.raises(InvalidInput, match="2 values of ours and 1 of the peer"):
        record_benchmark("odd", [1.0, 2.0], "s", peer=[1.0])


def test_the_page_shows_the_last_of_each_name_between_its_marks(place, tmp_path):
    for value in (5.0, 7.0):
        record_benchmark("drawing", [value], "images/s", peer=[1.0], peer_name="one by one")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):  # twice is once
        benchmarks.write_performance_table(str(place.root), page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("| drawing"))
    if rows_of(place)[0]["measured_at"] != rows_of(place)[1]["measured_at"]:
        assert "| 7 images/s | 1 (one by one) | 7 |" in line
    page.write_text("no marks")
    with pytest.raises(InvalidInput, match="lacks the lines"):
        benchmarks.write_performance_table(str(place.root), page)


def test_a_later_row_replaces_an_earlier_one_of_the_same_device():
    row = {"name": "a", "unit": "s", "ours": 1.0, "peer": None, "peer_name": None, "ratio": None, "repetitions": 1,
           "spread": 0.0, "device": "x", "driver": "", "commit": "c", "measured_at": "2026-01-02"}  # fmt: skip
    other = {**row, "ours": 9.0, "measured_at": "2026-01-01"}
    table = performance_table([row, other, {**other, "device": "y", "driver": "580"}])
    assert [line.split(" | ")[1] for line in table.splitlines()[2:]] == ["1 s", "9 s"]
    assert "y, driver 580" in table
    again = performance_table([{**row, "ours": 3.0}, {**row, "name": "b", "ours": 4.0}], table)
    assert [line.split(" | ")[1] for line in again.splitlines()[2:]] == ["3 s", "9 s", "4 s"]
