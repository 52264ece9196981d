"""A wheel, installed nowhere near the checkout, works as the checkout does."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bptool.report.html.page import page

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run_installed(installed: Path, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-P", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_every_preset_is_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    script = (
        "import bptool; from bptool.config.presets import preset_names, preset_text\n"
        "print(bptool.__file__); [print(name, len(preset_text(name))) for name in preset_names()]"
    )
    done = run_installed(installed, ["-c", script], tmp_path)
    assert done.returncode == 0, done.stderr
    where, *presets = done.stdout.splitlines()
    assert where.startswith(str(installed))
    in_checkout = {f"{path.stem} {len(path.read_text())}" for path in (CHECKOUT / "configs").glob("*.toml")}
    assert set(presets) == in_checkout


@pytest.mark.slow
def test_a_page_is_made_whole_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """Its style and script are files of the package."""
    script = "from bptool.report.html.page import page; import sys; sys.stdout.write(page('train', 'a', 'b', []))"
    done = run_installed(installed, ["-c", script], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == page("train", "a", "b", [])


@pytest.mark.slow
def test_a_wheel_trains_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    settings = ["training.steps=2", "model.n_layers=1", "model.d_model=32", "training.sequence_length=32"]
    done = run_installed(installed, ["-m", "bptool", "train", "tiny", *settings], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny" / "result.json").is_file()
