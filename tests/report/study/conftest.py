"""Studies with their pages, for what reads them and for what opens them in a browser."""

from pathlib import Path

import pytest
from studies import hostile, twelve_arms, two_arms, write_page


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Studies of 2 and of 12 arms, and one of hostile names and logs, each with its page."""
    root = tmp_path_factory.mktemp("pages")
    for name, make in (("two", two_arms), ("twelve", twelve_arms), ("hostile", hostile)):
        write_page(make(root / name))
    return {name: root / name for name in ("two", "twelve", "hostile")}
