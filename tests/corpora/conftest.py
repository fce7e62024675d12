from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpora.fabricated import fabricate


@pytest.fixture(scope="session")
def fabricated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an archive of every package; read only."""
    return fabricate(tmp_path_factory.mktemp("archives") / "here")
