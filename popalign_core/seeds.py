"""Seeds from identity: the same sample has the same seed in any order, batch, shard or resume."""

import hashlib


def derive_seed(run_seed: int, *names: str | int) -> int:
    """A 63-bit seed for what the names identify; distinct names give distinct seeds (BLAKE2b)."""
    # The kind and length of each part keep ("a", "bc") apart from ("ab", "c"), and 1 apart from "1". An enum member is
    # its text and a numpy integer is a number: both come back as the plain type from a table.
    parts = [f"{'str' if isinstance(name, str) else 'int'}:{len(str(name))}:{name!s}" for name in (run_seed, *names)]
    digest = hashlib.blake2b("|".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_seed(run_seed: int, family_id: str, index: int) -> int:
    """The seed of one image's initial noise.

    family_id: the neutral prompt's id, also for the identity-specific prompts made from it. Images of a family with
    the same index then start from the same noise, and differ in little but what the prompt changes.
    """
    return derive_seed(run_seed, "sample", family_id, index)
