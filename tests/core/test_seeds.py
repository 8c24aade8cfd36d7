import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from popalign_core.attributes import PerceivedGender
from popalign_core.seeds import derive_seed, sample_seed

names = st.lists(st.one_of(st.text(max_size=8), st.integers()), max_size=4).map(tuple)


@given(first=names, second=names, run_seed=st.integers(0, 2**32))
def test_distinct_names_give_distinct_seeds(
    first: tuple[str | int, ...], second: tuple[str | int, ...], run_seed: int
) -> None:
    # True and 1 are one value to Python, and "1" is not.
    same = [(type(part), part) for part in first] == [(type(part), part) for part in second]
    assert (derive_seed(run_seed, *first) == derive_seed(run_seed, *second)) is same


@given(run_seed=st.integers(0, 2**63), family=st.text(max_size=12), index=st.integers(0, 10**6))
def test_seeds_have_63_bits(run_seed: int, family: str, index: int) -> None:
    assert 0 <= sample_seed(run_seed, family, index) < 2**63


def test_parts_that_read_alike_when_joined_are_apart() -> None:
    assert derive_seed(0, "a", "bc") != derive_seed(0, "ab", "c")
    assert derive_seed(0, "1") != derive_seed(0, 1)
    assert derive_seed(0, "a|str:1:b") != derive_seed(0, "a", "b")


def test_samples_of_a_run_have_distinct_seeds_in_any_order() -> None:
    samples = [(family, index) for family in ("6e7a", "6e7b", "") for index in range(300)]
    seeds = {sample: sample_seed(7, *sample) for sample in samples}
    assert len(set(seeds.values())) == len(samples)
    assert all(seeds[sample] == sample_seed(7, *sample) for sample in reversed(samples))
    assert not set(seeds.values()) & {sample_seed(8, *sample) for sample in samples}


def test_a_seed_outlives_the_way_through_a_table() -> None:
    assert derive_seed(0, PerceivedGender.WOMAN) == derive_seed(0, "woman")
    assert sample_seed(0, "6e7a", int(np.int64(3))) == sample_seed(0, "6e7a", np.int64(3))  # pyright: ignore[reportArgumentType]


def test_seeds_are_the_same_in_every_release() -> None:
    assert sample_seed(0, "6e7a", 0) == 928645744620629008
    assert derive_seed(3, "alignment", "order", 2) == 7981588911578448256
