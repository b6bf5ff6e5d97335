"""Text for corpora."""

import hashlib


def words(count: int, salt: str = "") -> str:
    """Text that never repeats, so that every window of it is different."""
    return "".join(hashlib.sha256(f"{salt}{i}".encode()).hexdigest()[:7] + " " for i in range(count))
