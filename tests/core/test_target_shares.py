"""Targets: what a file may say, whom it holds for, and shipped figures that are as their source has them."""

import numpy as np
import pytest

from popalign_core.attributes import AXES
from popalign_core.errors import UnknownName
from popalign_core.target_shares import SHIPPED, TargetNotUsable, load_targets

GENDER, TONE = AXES["perceived_gender"], AXES["perceived_skin_tone"]
EVEN = "perceived_gender,,man,0.5\nperceived_gender,,woman,0.5\n"


def written(tmp_path, text: str, header: str = "axis,subject,group,share") -> str:
    path = tmp_path / "office.csv"
    path.write_text(f"{header}\n{text}", encoding="utf-8")
    return str(path)


def test_a_subject_has_its_own_row_and_all_others_the_general_one(tmp_path):
    text = EVEN + "perceived_gender,Nurse,man,0.121\nperceived_gender,Nurse,woman,0.88\n"
    (target,) = load_targets([written(tmp_path, text)])
    found = target.shares(GENDER, {"a": "nurses", "b": "judge"})
    assert target.name == "office"
    np.testing.assert_allclose(found["a"], np.array([0.121, 0.88]) / 1.001)
    np.testing.assert_allclose(found["b"], [0.5, 0.5])
    assert target.shares(TONE, {"a": "nurse"}) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no share"),
        ("perceived_gender,,man,0.5\n", "each of its groups once"),
        (EVEN + EVEN, "each of its groups once"),
        ("perceived_gender,,man,0.6\nperceived_gender,,woman,0.5\n", "sum to 1.1"),
        ("perceived_gender,,man,1.5\nperceived_gender,,woman,-.5\n", "not between 0 and 1"),
        ("perceived_gender,,man,half\nperceived_gender,,woman,0.5\n", "'half'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, text, message):
    with pytest.raises(TargetNotUsable, match=message):
        load_targets([written(tmp_path, text)])


def test_names_are_checked(tmp_path):
    with pytest.raises(UnknownName, match="'male'"):
        load_targets([written(tmp_path, "perceived_gender,,male,1\n")])
    with pytest.raises(TargetNotUsable, match="lacks the column 'share'"):
        load_targets([written(tmp_path, EVEN, "axis,subject,group,percent")])
    with pytest.raises(TargetNotUsable, match="us-cps-2022"):
        load_targets([str(tmp_path / "missing.csv")])
    with pytest.raises(TargetNotUsable, match="different names"):
        load_targets(["us-cps-2022", "us-cps-2022"])


def test_shipped_figures_have_a_source_and_a_year():
    for name in SHIPPED:
        (target,) = load_targets([name])
        assert all(row.source and row.year for row in target.rows)
    shares = load_targets(["us-cps-2022"])[0].shares(GENDER, {"a": "police officer", "b": "toy maker"})
    # Table 11 of the Current Population Survey, 2022: 12.7% women among police officers.
    np.testing.assert_allclose(shares["a"], [0.873, 0.127])
    assert "b" not in shares
