from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_runs import masked_regression, random_batches, run_steps, same_bits, small_config, transformer_step
from torch import Tensor

from bptool.errors import CheckpointError, StorageError
from bptool.training.assembly import build_step, capture, restore
from bptool.training.checkpoint import Checkpoint, CheckpointFolder
from bptool.training.instrument import Announcer

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"]


def checkpoint_of(step: int, size: int = 5) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    model = {
        "plain": torch.randn(size, 3, generator=generator),
        "turned": torch.randn(3, size, generator=generator).T,
        "half": torch.randn(7, generator=generator).bfloat16(),
        "count": torch.tensor(step),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    optimizer = {"plain/exp_avg": torch.randn(size, 3, generator=generator), "plain/step": torch.tensor(float(step))}
    return Checkpoint(step, model, optimizer, {"data_fingerprint": "abc", "loss_scale": [65536.0, 3]})


def folder_with(path: Path, *steps: int, keep: int = 9) -> tuple[CheckpointFolder, list[str]]:
    """Checkpoints of those steps, and the warnings that will be given about them."""
    warnings: list[str] = []
    folder = CheckpointFolder(path, keep=keep, warn=warnings.append)
    for step in steps:
        folder.save(checkpoint_of(step))
    return folder, warnings


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir())


def same(left: Checkpoint, right: Checkpoint) -> bool:
    return left.step == right.step and same_bits(left.model, right.model) and same_bits(left.optimizer, right.optimizer)


class TestRoundTrip:
    def test_everything_comes_back_to_the_bit(self, tmp_path: Path) -> None:
        folder, warnings = folder_with(tmp_path / "checkpoints", 7)
        found = folder.newest_valid()
        assert found is not None
        assert same(found, checkpoint_of(7))
        assert found.state == {"data_fingerprint": "abc", "loss_scale": [65536.0, 3], "step": 7}
        assert names(folder) == ["step-00000007"]
        assert sorted(path.name for path in (tmp_path / "checkpoints/step-00000007").iterdir()) == sorted(FILES)
        assert warnings == []

    def test_the_newest_is_found(self, tmp_path: Path) -> None:
        folder, _ = folder_with(tmp_path, 9, 10, 1000)
        assert folder.require_newest().step == 1000

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        folder = CheckpointFolder(tmp_path / "none", keep=1)
        assert folder.newest_valid() is None
        assert folder.finished() == []
        with pytest.raises(CheckpointError, match=r"no valid checkpoint in .*none"):
            folder.require_newest()

    def test_tied_weights(self, tmp_path: Path) -> None:
        """A user's model names one tensor twice; safetensors takes none that share their memory."""
        tied = torch.randn(4, 2)
        folder = CheckpointFolder(tmp_path, keep=1)
        folder.save(Checkpoint(1, {"embedding": tied, "head": tied, "row": tied[1:3]}, {}, {}))
        assert same_bits(folder.require_newest().model, {"embedding": tied, "head": tied, "row": tied[1:3]})

    @pytest.mark.parametrize("optimizer", ["gradient-descent", "adamw", "muon"])
    def test_a_restored_step_goes_on_as_if_it_had_never_stopped(self, tmp_path: Path, optimizer: str) -> None:
        config = small_config({"optimizer.name": optimizer, "schedule.warmup_steps": 2, "training.steps": 6})
        unbroken = transformer_step(config)
        run_steps(unbroken, 6)
        first = transformer_step(config)
        run_steps(first, 3)
        folder = CheckpointFolder(tmp_path, keep=1)
        folder.save(capture(first, 3, {}))
        second = transformer_step(config)
        restore(second, folder.require_newest())
        for number in range(3, 6):
            second(number, random_batches(second, number))
        assert same_bits(second.model.state_dict(), unbroken.model.state_dict())
        assert same_bits(second.optimizers.state(), unbroken.optimizers.state())

    def test_the_loss_scale_is_kept(self, tmp_path: Path) -> None:
        config = small_config({"precision.mode": "fp16-mixed"})
        step = build_step(config, masked_regression(), torch.device("cpu"), Announcer())
        assert step.precision.loss_scale is not None
        step.precision.loss_scale.value, step.precision.loss_scale.good_steps = 512.0, 17
        folder = CheckpointFolder(tmp_path, keep=1)
        folder.save(capture(step, 1, {"note": "kept"}))
        fresh = build_step(config, masked_regression(), torch.device("cpu"), Announcer())
        found = folder.require_newest()
        restore(fresh, found)
        assert fresh.precision.loss_scale is not None
        assert (fresh.precision.loss_scale.value, fresh.precision.loss_scale.good_steps) == (512.0, 17)
        assert found.state["note"] == "kept"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, which every example damages and puts right again."""
    path = tmp_path_factory.mktemp("damage")
    folder_with(path, 1, 2)
    return path


class TestDamage:
    @settings(max_examples=80, deadline=None)
    @given(st.sampled_from(FILES), st.data())
    def test_a_changed_byte_is_found(self, whole: Path, file: str, data: st.DataObject) -> None:
        path = whole / "step-00000002" / file
        content = path.read_bytes()
        position = data.draw(st.integers(0, len(content) - 1))
        byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[position]))
        try:
            path.write_bytes(content[:position] + bytes([byte]) + content[position + 1 :])
            self._expect_the_older(whole, path, content)
        finally:
            path.write_bytes(content)

    @settings(max_examples=40, deadline=None)
    @given(st.sampled_from(FILES), st.data())
    def test_a_file_cut_short_is_found(self, whole: Path, file: str, data: st.DataObject) -> None:
        path = whole / "step-00000002" / file
        content = path.read_bytes()
        length = data.draw(st.integers(0, len(content) - 1))
        try:
            path.write_bytes(content[:length])
            self._expect_the_older(whole, path, content)
        finally:
            path.write_bytes(content)

    @pytest.mark.parametrize("file", FILES)
    def test_a_missing_file_is_found(self, tmp_path: Path, file: str) -> None:
        folder, warnings = folder_with(tmp_path, 1, 2)
        (tmp_path / "step-00000002" / file).unlink()
        assert folder.require_newest().step == 1
        assert warnings == [f"checkpoint step-00000002 is passed over: {file} is missing"]

    @pytest.mark.parametrize("content", ["[]", "null", "{}", '{"model.safetensors": 1}', "\x00\x00", "{"])
    def test_checksums_of_another_kind(self, tmp_path: Path, content: str) -> None:
        folder, warnings = folder_with(tmp_path, 1, 2)
        (tmp_path / "step-00000002" / "checksums.json").write_text(content)
        assert folder.require_newest().step == 1
        assert len(warnings) == 1

    def test_where_none_is_valid_each_is_named(self, tmp_path: Path) -> None:
        folder, warnings = folder_with(tmp_path, 1, 2)
        for step in (1, 2):
            (tmp_path / f"step-0000000{step}" / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError):
            folder.require_newest()
        assert [warning.split(" is")[0] for warning in warnings] == [
            "checkpoint step-00000002",
            "checkpoint step-00000001",
        ]
        assert all("model.safetensors does not match its checksum" in warning for warning in warnings)

    def test_a_good_name_does_not_make_a_checkpoint(self, tmp_path: Path) -> None:
        folder, warnings = folder_with(tmp_path, 3)
        (tmp_path / "step-00000004").mkdir()
        (tmp_path / "step-00000005").write_text("a file")
        assert folder.require_newest().step == 3
        assert len(warnings) == 2

    @staticmethod
    def _expect_the_older(whole: Path, damaged: Path, content: bytes) -> None:
        """Unless what is damaged still says the same."""
        warnings: list[str] = []
        found = CheckpointFolder(whole, keep=9, warn=warnings.append).newest_valid()
        assert found is not None
        if found.step == 2:  # white space of checksums.json: the JSON is what it was
            assert damaged.name == "checksums.json"
            assert json.loads(damaged.read_text()) == json.loads(content)
        else:
            assert same(found, checkpoint_of(1))
            assert len(warnings) == 1
            assert warnings[0].startswith("checkpoint step-00000002 is passed over: ")
            assert damaged.name in (*warnings[0].split(), "checksums.json")  # which may name any other


class TestKeep:
    @pytest.mark.parametrize("keep", [1, 2, 3, 10])
    def test_the_newest_stay(self, tmp_path: Path, keep: int) -> None:
        folder, _ = folder_with(tmp_path, 2, 4, 6, 8, 10, keep=keep)
        assert [path.name for path in folder.finished()] == [f"step-{s:08d}" for s in (2, 4, 6, 8, 10)[-keep:]]

    def test_one_that_lost_a_file_is_not_counted(self, tmp_path: Path) -> None:
        folder, _ = folder_with(tmp_path, 1, 2, 3, keep=3)
        (tmp_path / "step-00000003" / "optimizer.safetensors").unlink()
        folder.save(checkpoint_of(4))
        assert names(folder) == ["step-00000001", "step-00000002", "step-00000004"]

    @pytest.mark.parametrize("keep", [1, 2])
    def test_a_damaged_newer_one_never_costs_a_good_one(self, tmp_path: Path, keep: int) -> None:
        """A resume passed step 30 over and saves at 25: what was just written must stay."""
        folder_with(tmp_path, 10, 20, 30)
        (tmp_path / "step-00000030" / "model.safetensors").write_bytes(b"damaged")
        resumed = CheckpointFolder(tmp_path, keep=keep)
        resumed.save(checkpoint_of(25))
        assert [path.name for path in resumed.finished()] == ["step-00000020", "step-00000025"][-keep:]
        assert same(resumed.require_newest(), checkpoint_of(25))

    def test_a_damaged_one_of_the_same_step_is_replaced(self, tmp_path: Path) -> None:
        folder, _ = folder_with(tmp_path, 1, 2)
        (tmp_path / "step-00000002" / "state.json").write_text("{}")
        folder.save(checkpoint_of(2))
        assert same(folder.require_newest(), checkpoint_of(2))


class TestUnfinished:
    def test_a_leftover_is_no_checkpoint_and_goes_with_the_next(self, tmp_path: Path) -> None:
        folder, warnings = folder_with(tmp_path, 1, 2)
        shutil.copytree(tmp_path / "step-00000002", tmp_path / ".writing-00000003")
        assert folder.require_newest().step == 2
        assert warnings == []
        folder.save(checkpoint_of(4))
        assert names(folder) == ["step-00000001", "step-00000002", "step-00000004"]

    @pytest.mark.parametrize("fails_at", ["model.safetensors", "optimizer.safetensors"])
    def test_a_disk_that_is_full_leaves_the_earlier_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
    ) -> None:
        folder, _ = folder_with(tmp_path, 1, 2, keep=2)

        def fail_there(tensors: dict[str, Tensor], path: Path, **rest: Any) -> None:
            if path.name == fails_at:
                path.write_bytes(b"half of")
                raise OSError(errno.ENOSPC, "No space left on device")
            save_file(tensors, path, **rest)

        monkeypatch.setattr("bptool.training.checkpoint.save_file", fail_there)
        with pytest.raises(StorageError, match=r"checkpoint of step 3 could not be written.*No space left") as caught:
            folder.save(checkpoint_of(3))
        assert "earlier checkpoints are untouched" in caught.value.remedy
        self._expect_both(folder)

    @pytest.mark.parametrize("call", ["fsync", "rename"])
    def test_a_failure_at_the_end_leaves_the_earlier_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        folder, _ = folder_with(tmp_path, 1, 2, keep=2)

        def fail(*arguments: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(StorageError, match="Input/output error"):
            folder.save(checkpoint_of(3))
        monkeypatch.undo()
        self._expect_both(folder)

    def test_a_write_that_the_system_refuses(self, tmp_path: Path) -> None:
        """The kernel itself stops the write in the middle of the file."""
        folder, _ = folder_with(tmp_path, 1, 2, keep=2)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(StorageError, match="checkpoint of step 3 could not be written"):
                folder.save(checkpoint_of(3, size=2000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        self._expect_both(folder)

    def test_a_real_full_disk(self, small_disk: Path) -> None:
        folder, _ = folder_with(small_disk, 1, 2, keep=2)
        with pytest.raises(StorageError, match="No space left on device"):
            folder.save(checkpoint_of(3, size=20_000))
        self._expect_both(folder)
        folder.save(checkpoint_of(4))
        assert folder.require_newest().step == 4

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount a small disk")
        yield disk
        subprocess.run(["umount", str(disk)], check=True)

    def test_a_file_where_the_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(StorageError, match="could not be written"):
            CheckpointFolder(tmp_path / "checkpoints", keep=1).save(checkpoint_of(1))

    @staticmethod
    def _expect_both(folder: CheckpointFolder) -> None:
        assert names(folder) == ["step-00000001", "step-00000002"]
        assert same(folder.require_newest(), checkpoint_of(2))


def test_a_checkpoint_is_renamed_only_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file, the folder and, after the rename, the folder above are flushed, in that order."""
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        log.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def logged_rename(*arguments: Any, **rest: Any) -> None:
        log.append("rename")
        rename(*arguments, **rest)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    CheckpointFolder(tmp_path / "checkpoints", keep=1).save(checkpoint_of(1))
    assert log == [*FILES, ".writing-00000001", "rename", "checkpoints"]


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = folder_with(tmp_path, 1)
    for file in FILES:
        content = (tmp_path / "step-00000001" / file).read_bytes()
        assert not content.startswith((b"\x80", b"PK"))  # pickle's protocol mark, torch.save's zip archive

    def refuse(*arguments: object, **rest: object) -> None:
        raise AssertionError("a checkpoint was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert folder.require_newest().step == 1
