"""Looking for a user's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from bptool.data.files import existing
from bptool.errors import DataError, StorageError


def test_nearest_name_beside_a_missing_path(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").touch()
    with pytest.raises(DataError, match=r"^data\.source: '.*shakespear\.txt' does not exist, .*'shakespeare\.txt'"):
        existing(tmp_path / "shakespear.txt", "data.source")


def test_nearest_word_instead_of_a_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'python-stdlib'"):
        existing(tmp_path / "python-stlib", "data.source", ["python-stdlib"])


def test_missing_folder_and_nul_are_plain_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "such", tmp_path / "nul\0"):
        with pytest.raises(DataError, match="does not exist"):
            existing(path, "data.source")


def test_closed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(StorageError, match="cannot be read: Permission denied"):
        existing(tmp_path / "x", "data.source")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").touch()
    assert existing(Path("~/x"), "data.source") == tmp_path / "x"
