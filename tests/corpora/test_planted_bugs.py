"""Each check must notice the bugs it is there for: plant one, see the check fail."""


from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest

from tests.corpora.checks import (
    check_checksums,
    check_chinese,
    check_no_name_leads_out,
    check_other_folders_are_refused,
    check_split,
)
from tidal.corpora import archives, build, chinese, code, fetch


class Blind(str):
    """A checksum that equals all others."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def blind_digest(file: io.BufferedReader, name: str) -> SimpleNamespace:
    digest = hashlib.file_digest(file, name).hexdigest()
    return SimpleNamespace(hexdigest=lambda: Blind(digest))


@pytest.mark.parametrize(
    ("module", "name", "bug", "check"),
    [
        (code, "held_out_by_hash", lambda key: hash(key) % 16 == 0, "split"),
        (code, "held_out_by_hash", lambda key: len(key) % 16 == 0, "split"),
        (chinese, "without_repetition", lambda pages: pages, "chinese"),
        (chinese, "held_out_by_hash", lambda key: False, "chinese"),
        (chinese, "LONG", 10_000, "chinese"),
        (build, "_digest", lambda folder: "the same", "folders"),
        (archives, "PurePosixPath", lambda name: PurePosixPath(name.replace("..", "").lstrip("/")), "names"),
        (fetch, "hashlib", SimpleNamespace(file_digest=blind_digest), "checksums"),
    ],
)
def test_planted_bugs(module: object, name: str, bug: object, check: str, fabricated: Path, tmp_path: Path,
                      monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    checks: dict[str, Callable[[], None]] = {
        "split": lambda: check_split(list(code.standard_library())),
        "chinese": lambda: check_chinese(fabricated),
        "folders": lambda: check_other_folders_are_refused(fabricated, tmp_path),
        "names": lambda: check_no_name_leads_out(tmp_path),
        "checksums": lambda: check_checksums(fabricated, tmp_path, capsys),
    }
    monkeypatch.setattr(module, name, bug)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        checks[check]()
