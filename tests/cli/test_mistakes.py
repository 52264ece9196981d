"""What goes wrong: one clear message, the documented exit code, and nothing lost that was saved."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from command_line import SMALL, Command, Done, checkpoints, curve, ended, invoke, metrics, start, weights

from bptool.hardware import available_memory_bytes
from bptool.training.step import StepOutcome, TrainStep
from bptool.training.workload import Batch


def told(done: Done, code: int, *words: str) -> list[str]:
    """Check the exit code, that stdout is empty and that the message says `words`; returns the message's lines."""
    assert (done.code, done.out) == (code, ""), done.err
    _, error, message = f"\n{done.err}".rpartition("\nerror: ")
    assert error, done.err
    missing = [word for word in words if word not in message]
    assert not missing, done.err
    return message.splitlines()


class TestConfig:
    def test_all_mistakes_at_once_each_with_what_was_meant(self, here: Path) -> None:
        mistakes = [
            "model.n_layer=2",
            "batch_size=3",
            "model.norm=rmnsorm",
            "optimizer.lr=-1",
            "training.compile=maybe",
        ]
        lines = told(invoke("train", *mistakes), 2)
        assert lines[0] == "command line: 5 problems"
        expected = ["'model.n_layers'", "'training.micro_batch_size'", "'rmsnorm'", "above 0", "true or false"]
        problems = {line.strip().partition(":")[0]: line for line in lines[1:]}
        assert [mistake.partition("=")[0] for mistake in mistakes] == sorted(
            problems, key=[mistake.partition("=")[0] for mistake in mistakes].index
        )
        for mistake, meant in zip(mistakes, expected, strict=True):
            assert meant in problems[mistake.partition("=")[0]]

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (["model.d_model=64", "model.n_heads=3"], ["model.d_model = 64", "model.n_heads = 3", "model.head_dim"]),
            (["model.n_heads=4", "model.n_kv_heads=3"], ["model.n_kv_heads = 3", "model.n_heads = 4"]),
            (
                ["model.context_length=64", "training.sequence_length=65"],
                ["training.sequence_length = 65", "model.context_length = 64"],
            ),
            (["run.name=a/b"], ["run.name"]),
            (["model.rope.scaling=llama3", "model.rope.high_frequency_factor=1"], ["low_frequency_factor"]),
        ],
    )
    def test_settings_that_do_not_go_together(self, here: Path, settings: list[str], words: list[str]) -> None:
        told(invoke("train", *settings), 2, "command line: 1 problem", *words)

    def test_a_toml_file_with_mistakes_is_named(self, here: Path) -> None:
        Path("my.toml").write_text("[model]\nn_layers = 2\nn_head = 2\n")
        told(invoke("train", "my.toml"), 2, "my.toml: 1 problem", "model.n_head", "'model.n_heads'")

    def test_no_toml(self, here: Path) -> None:
        Path("my.toml").write_text("[model\n")
        told(invoke("train", "my.toml"), 2, "my.toml", "not TOML", "line 1")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["tinny"], ["'tinny'", "did you mean 'tiny'?"]),
            (["tiny", "gpt2"], ["more than one TARGET"]),
            (["nowhere.py:model"], ["nowhere.py"]),
            (["optimizer.lr", "=", "3"], ["more than one TARGET", "without spaces"]),
        ],
    )
    def test_targets(self, here: Path, arguments: list[str], words: list[str]) -> None:
        told(invoke("train", *arguments), 2, *words)

    def test_an_implementation_that_the_optimizer_lacks(self, train: Command) -> None:
        told(
            train("optimizer.name=gradient-descent", "optimizer.implementation=fused"),
            *(2, "implementation = 'fused'", "loop", "optimizer.implementation=auto"),
        )


class TestData:
    def test_a_text_that_is_too_short(self, train: Command) -> None:
        Path("short.txt").write_text("too short\n")
        told(train("data.source=short.txt"), 2, "short.txt", "10 tokens", "at least 33", "more text")

    @pytest.mark.parametrize("name", ["empty.txt", "empty.bin"])
    def test_an_empty_file(self, train: Command, name: str) -> None:
        Path(name).touch()
        told(train(f"data.source={name}"), 2, name, "is empty")

    @pytest.mark.parametrize("name", ["tekst.txt", "tekst.bin"])
    def test_a_missing_file(self, train: Command, name: str) -> None:
        Path(name.replace("k", "x")).touch()
        told(train(f"data.source={name}"), 2, f"'{name}' does not exist, did you mean '{name.replace('k', 'x')}'?")

    def test_a_token_beyond_the_vocabulary(self, train: Command) -> None:
        ids = np.arange(4000, dtype="<u2") % 256
        ids[777] = 300
        ids.tofile("ids.bin")
        told(
            train("data.source=ids.bin"),
            *(2, "position 777", "id 300", "model.vocab_size = 256", "model.vocab_size=301"),
        )

    def test_a_tokenizer_beyond_the_vocabulary(self, train: Command) -> None:
        told(train("model.vocab_size=200"), 2, "model.vocab_size = 200", "256 ids", "model.vocab_size=256")

    def test_weights_in_a_pickle_are_not_read(self, here: Path) -> None:
        Path("hf").mkdir()
        config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 256, "n_positions": 64}
        Path("hf/config.json").write_text(json.dumps(config))
        Path("hf/pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
        told(invoke("train", "hf", "training.device=cpu"), 2, "pytorch_model.bin", "pickle", "safetensors")
        assert not Path("exploded").exists()


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("exploded",)


class TestMachine:
    @pytest.mark.parametrize(
        ("setting", "words"),
        [
            ("training.device=cuda:99", ["training.device = 'cuda:99'", "training.device=cpu"]),
            ("training.device=gpu", ["training.device = 'gpu'", "cuda"]),
            ("precision.mode=tf32", ["precision.mode = 'tf32'", "precision.mode=fp32"]),
        ],
    )
    def test_a_device_that_is_not_there_or_cannot(self, train: Command, setting: str, words: list[str]) -> None:
        told(train(setting), 3, *words)

    def test_no_compiler(self, train: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        told(train("training.compile=true"), 3, "C++ compiler", "training.compile=false")

    def test_a_folder_that_cannot_be_made(self, train: Command) -> None:
        told(train("run.directory=/proc/nowhere"), 3, "/proc/nowhere/tiny cannot be written", "run.directory=")

    def test_a_model_that_can_never_fit_is_refused_at_once(self, here: Path) -> None:
        message = told(invoke("train", "llama3-405b", "training.device=cpu"), 3, "optimizer state alone need", "TiB")
        assert "choose a smaller model" in message[1]

    def test_a_step_that_does_not_fit_is_refused_with_overrides_that_do(
        self, train: Command, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bptool.analysis.machine.available_memory_bytes", lambda device: 4 * 2**20)
        settings = ["training.micro_batch_size=32", "model.n_layers=2"]
        lines = told(train(*settings), 3, "peak is predicted as", "4.00 MiB are available", "these would fit:")
        *overrides, _, _ = lines[2].split()
        assert train(*settings, *overrides).code == 0

    def test_memory_that_runs_out_in_a_step(self, train: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        """As PyTorch's CPU allocator says it; the checkpoint that was there is kept."""
        train("run.name=a", "training.steps=2")
        refusals = iter(["[enforce fail] DefaultCPUAllocator: can't allocate memory: 4096 bytes"])
        whole = TrainStep.__call__

        def refuse_once(step: TrainStep, number: int, micro_batches: Sequence[Batch]) -> StepOutcome:
            if number == 2 and (words := next(refusals, "")):
                raise RuntimeError(words)
            return whole(step, number, micro_batches)

        monkeypatch.setattr(TrainStep, "__call__", refuse_once)
        told(invoke("train", "--resume", "a", "training.steps=4"), 3, "memory ran out", "4096 bytes", "these would fit")
        assert checkpoints(Path("runs/a")) == [2]
        assert invoke("train", "--resume", "a", "training.steps=4").code == 0

    @pytest.mark.slow
    def test_memory_that_the_system_refuses(self, here: Path, text: Path) -> None:
        """A limit on the address space, of which the prediction knows nothing."""
        if not shutil.which("prlimit"):
            pytest.skip("needs prlimit")
        settings = ["training.micro_batch_size=16384", "training.steps=3", f"data.source={text}"]
        process = start("train", *SMALL, *settings, folder=here, before=["prlimit", f"--as={3 * 2**30}"])
        told(
            ended(process), 3, "memory ran out", "DefaultCPUAllocator", "predicted as", "training.micro_batch_size=8192"
        )

    def test_what_was_available_is_the_machines(self) -> None:
        import torch

        assert 2**27 < available_memory_bytes(torch.device("cpu")) < 2**50


@pytest.fixture
def small_disk(here: Path) -> Iterator[Callable[[str], None]]:
    """Makes a file system of a given size at `disk`."""
    place = Path(tempfile.mkdtemp())  # not in pytest's own folder, which it could not delete if this were killed
    (here / "disk").symlink_to(place)

    def mount(size: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(command, check=False).returncode != 0:
            pytest.skip("needs to mount a file system")

    yield mount
    if place.is_mount():
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # a resumed run's tensors may still map its files
    place.rmdir()


class TestFullDisk:
    def test_during_a_checkpoint(self, train: Command, small_disk: Callable[[str], None]) -> None:
        """The earlier checkpoint stays, and the run goes on from it once there is room, as if nothing had been."""
        settings = ["training.steps=6", "checkpoint.every=2", "checkpoint.keep=5", "logging.tensorboard=false"]
        train(*settings, "run.name=unbroken")
        small_disk("600k")
        told(train(*settings, "run.directory=disk"), 3, "checkpoint of step 4", "No space left", "resume the run")
        run = Path("disk/tiny")
        assert checkpoints(run) == [2]
        assert not list((run / "checkpoints").glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=9m", str(Path("disk").resolve())], check=True)
        assert invoke("train", "--resume", "disk/tiny").code == 0
        assert weights(run) == weights(Path("runs/unbroken"))

    @pytest.mark.parametrize(
        ("setting", "file"),
        [("logging.gradient_histograms_every=1", "events.out."), ("logging.tensorboard=false", "metrics.jsonl")],
    )
    def test_while_logging(self, train: Command, small_disk: Callable[[str], None], setting: str, file: str) -> None:
        small_disk("40k")
        settings = ["training.steps=9999", "evaluation.every=0", "evaluation.sample_every=0", "checkpoint.every=0"]
        done = train(*settings, "run.directory=disk", setting)
        told(done, 3, f"disk/tiny/{file}", "No space left on device", "make room")

    def test_at_the_start(self, train: Command, small_disk: Callable[[str], None]) -> None:
        small_disk("16k")
        Path("disk/filling").write_bytes(bytes(16 * 1024 - 4096))
        told(train("run.directory=disk"), 3, "disk/tiny", "No space left on device")


class TestCheckpoints:
    def test_one_that_is_cut_short_is_named_and_passed_over(self, done_run: Path) -> None:
        whole = weights(done_run)
        file = done_run / "checkpoints/step-00000006/model.safetensors"
        file.write_bytes(file.read_bytes()[:-7])
        done = invoke("train", "--resume", "done")
        assert done.code == 0
        assert "note: checkpoint step-00000006 is passed over: model.safetensors does not match" in done.err
        assert "(from step 4)" in done.out
        assert weights(done_run) == whole
        assert [step for step, _ in curve(done_run, "train/loss")] == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("arguments", [["train", "--resume", "done"], ["sample", "done"], ["export", "done", "x"]])
    def test_none_is_valid(self, done_run: Path, arguments: list[str]) -> None:
        for file in done_run.glob("checkpoints/*/optimizer.safetensors"):
            file.write_bytes(b"")
        done = invoke(*arguments)
        told(done, 3, "no valid checkpoint in runs/done/checkpoints", "--force")
        assert done.err.count("is passed over") == 3

    @pytest.mark.parametrize("arguments", [["sample", "done"], ["export", "done", "x"]])
    def test_there_is_none_yet(self, done_run: Path, arguments: list[str]) -> None:
        shutil.rmtree(done_run / "checkpoints")
        told(invoke(*arguments), 3, "runs/done/checkpoints", "none was written yet", "checkpoint.every")

    @pytest.mark.parametrize(
        "arguments", [["train", "--resume", "done", "training.steps=9"], ["sample", "done"], ["export", "done", "x"]]
    )
    def test_one_of_another_model(self, train: Command, done_run: Path, arguments: list[str]) -> None:
        train("run.name=other", "model.d_model=16", "training.steps=1")
        shutil.rmtree(done_run / "checkpoints")
        shutil.copytree("runs/other/checkpoints", done_run / "checkpoints")
        told(invoke(*arguments), 2, "of another model", "attention.key.weight", "(16, 16)", "(32, 32)")

    def test_a_pickle_in_the_place_of_weights_is_never_unpickled(self, done_run: Path) -> None:
        for folder in (done_run / "checkpoints").iterdir():
            (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
            shutil.copyfile(folder / "model.safetensors", folder / "pytorch_model.bin")
            checksums = json.loads((folder / "checksums.json").read_text())
            checksums["model.safetensors"] = sha256(folder / "model.safetensors")
            (folder / "checksums.json").write_text(json.dumps(checksums))
        for arguments in (["train", "--resume", "done", "training.steps=9"], ["sample", "done"]):
            told(invoke(*arguments), 3)
        assert not Path("exploded").exists()


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


DIVERGING = (
    *("optimizer.name=gradient-descent", "optimizer.lr=1e20", "training.clip_norm=0"),
    *("schedule.name=constant", "training.steps=6"),
)


class TestNonFinite:
    def test_the_run_stops_before_the_update_and_says_where(self, train: Command) -> None:
        done = train(*DIVERGING)
        message = told(done, 1, "step 2: the loss is nan", "first non-finite: the output of blocks.0.", "not applied")
        run = Path("runs/tiny")
        assert checkpoints(run) == [1]
        assert [line["step"] for line in metrics(run)] == [1]
        assert "runs/tiny/checkpoints/step-00000001" in message[-1]
        assert not (run / "result.json").exists()

    def test_the_saved_weights_are_those_before_that_step(self, train: Command) -> None:
        """The oracle is a run that ends there."""
        train(*DIVERGING, "run.name=stopped")
        train(*DIVERGING, "run.name=short", "training.steps=1", "gradients.on_nonfinite=skip")
        assert weights(Path("runs/stopped")) == weights(Path("runs/short"))

    def test_skip_goes_on_and_says_so(self, train: Command) -> None:
        done = train(*DIVERGING, "gradients.on_nonfinite=skip", "--json")
        assert done.code == 0
        assert done.err.count("its update is skipped") == 5
        assert "no sample at step 6" in done.err
        assert "NaN" not in done.out
        assert (done.result["steps"], done.result["train_loss"], done.result["val_loss"]) == (6, None, None)
        lines = metrics(Path("runs/tiny"))
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert [line["train/loss"] is None for line in lines] == [False, *[True] * 5]

    def test_weights_that_only_an_evaluation_finds_bad_are_not_saved(self, train: Command) -> None:
        done = train(*DIVERGING, "training.steps=1")
        told(done, 1, "after step 1: the held-out loss is nan", "gradients.on_nonfinite=skip")
        assert checkpoints(Path("runs/tiny")) == []


@pytest.mark.parametrize(
    ("stdout", "code", "words"), [("/dev/full", 3, "No space left on device"), ("a reader that left", 0, "")]
)
def test_a_stdout_that_takes_nothing(trained: Path, stdout: str, code: int, words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    target = writer if code == 0 else os.open(stdout, os.O_WRONLY)
    done = ended(start("sample", "done", folder=trained, stdout=target))
    assert (done.code, words in done.err, "Traceback" in done.err, "Exception" in done.err) == (
        code,
        True,
        False,
        False,
    )
    if code == 0:
        assert done.err == ""
