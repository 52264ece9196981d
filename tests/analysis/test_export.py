from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bptool.analysis.export import export_run
from bptool.config.huggingface import model_settings_from_huggingface
from bptool.errors import StorageError, UsageError
from bptool.interop.huggingface import load_weights
from bptool.training.run_folder import read_run_config


def no_notes(message: str) -> None:
    raise AssertionError(message)


def test_the_weights_are_the_newest_checkpoints(done_run: Path) -> None:
    """Read back by our own names, and compared with the checkpoint's file."""
    result = export_run(done_run, Path("exported"), force=False, note=no_notes)
    assert (result.step, result.family) == (6, "llama")
    written = json.loads(Path("exported/config.json").read_text())
    settings = model_settings_from_huggingface(written, "exported")
    assert settings == read_run_config(done_run).model
    stored = load_file(done_run / "checkpoints/step-00000006/model.safetensors")
    read = load_weights(Path("exported"), settings)
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], stored[name]) for name in stored)


def test_an_older_checkpoint_where_the_newest_is_broken(done_run: Path) -> None:
    (done_run / "checkpoints/step-00000006/model.safetensors").write_bytes(b"")
    notes: list[str] = []
    assert export_run(done_run, Path("exported"), force=False, note=notes.append).step == 4
    assert "step-00000006 is passed over" in notes[0]


def test_a_file_in_the_way(done_run: Path) -> None:
    Path("exported").write_text("mine")
    with pytest.raises(UsageError, match="exported exists"):
        export_run(done_run, Path("exported"), force=False, note=no_notes)
    with pytest.raises(StorageError, match="exported"):
        export_run(done_run, Path("exported"), force=True, note=no_notes)
    assert Path("exported").read_text() == "mine"


def test_a_full_disk_leaves_the_model_that_was_there(done_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_run(done_run, Path("exported"), force=False, note=no_notes)
    before = {entry.name: entry.read_bytes() for entry in Path("exported").iterdir()}
    (done_run / "checkpoints/step-00000006/model.safetensors").write_bytes(b"")  # the next one would be another model

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageError, match=r"model\.safetensors could not be written: No space left on device"):
        export_run(done_run, Path("exported"), force=True, note=lambda message: None)
    assert {entry.name: entry.read_bytes() for entry in Path("exported").iterdir()} == before
