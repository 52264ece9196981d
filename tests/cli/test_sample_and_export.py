"""`bptool sample` and `bptool export`, and the way back: an exported folder as a TARGET."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import SMALL, Command, Done, curve, invoke
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bptool.model.transformer import build
from bptool.training.assembly import load_model
from bptool.training.checkpoint import CheckpointFolder
from bptool.training.run_folder import RunFolder, read_run_config

SENTENCES = ["def f(x):\n    return x\n", "  two  spaces, ünïcödé and 日本語 ", "<|endoftext|>", ""]


def refused(done: Done, code: int, *words: str) -> None:
    assert (done.code, done.out) == (code, ""), done.err
    assert [word for word in words if word not in done.err] == []


class TestSample:
    def test_the_same_seed_writes_the_same_text(self, done_run: Path) -> None:
        once = invoke("sample", "done", "--seed", "3", "--tokens", "40")
        assert once.code == 0
        assert invoke("sample", "runs/done", "--seed", "3", "-n", "40") == once
        assert invoke("sample", "done", "--seed", "4", "--tokens", "40").out != once.out

    @pytest.mark.parametrize("prompt", ["class A:\n    ", "день добрый", "数"])
    def test_it_begins_with_the_prompt(self, done_run: Path, prompt: str) -> None:
        assert invoke("sample", "done", "--prompt", prompt, "--tokens", "3").out.startswith(prompt)

    def test_tokens_are_counted(self, done_run: Path) -> None:
        """A byte-level model at temperature 0, so that each token is one byte of the longer text's beginning."""
        greedy = ["--temperature", "0", "--prompt", "x", "--json"]
        short, long = (invoke("sample", "done", "-n", n, *greedy).result["text"] for n in ("10", "30"))
        assert 1 < len(short) <= 11
        assert long.startswith(short.rstrip("�"))

    def test_top_k_of_one_is_temperature_zero(self, done_run: Path) -> None:
        greedy = invoke("sample", "done", "--temperature", "0", "-n", "20")
        assert invoke("sample", "done", "--top-k", "1", "--seed", "5", "-n", "20") == greedy
        assert invoke("sample", "done", "--top-k", "0", "--temperature", "1", "-n", "20") != greedy

    def test_the_run_may_be_training(self, done_run: Path) -> None:
        with RunFolder.resume(done_run):
            assert invoke("sample", "done").code == 0
            assert invoke("export", "done", "exported").code == 0

    def test_a_checkpoint_that_goes_while_it_is_read_is_no_error(
        self, done_run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The trainer lets the newest one go for a newer one at the worst moment: found valid, not yet read."""
        folders = sorted((done_run / "checkpoints").iterdir())

        def load(path: Path) -> dict[str, torch.Tensor]:
            if folders[-1] in path.parents and folders[-1].exists():
                folders[-1].rename(done_run / "checkpoints" / "step-00000009")
            tensors: dict[str, torch.Tensor] = load_file(path)
            return tensors

        monkeypatch.setattr("bptool.training.checkpoint.load_file", load)
        done = invoke("sample", "done", "--json")
        assert (done.code, done.err) == (0, "")

    def test_another_place_for_runs(self, done_run: Path) -> None:
        shutil.move("runs/done", "elsewhere")
        assert invoke("sample", "elsewhere").code == 0
        refused(invoke("sample", "done"), 2, "no run at runs/done")

    def test_a_device_that_is_not_there(self, done_run: Path) -> None:
        refused(invoke("sample", "done", "--device", "cuda:77"), 3, "cuda:77")


class TestTokenFile:
    @pytest.fixture
    def token_run(self, train: Command) -> Path:
        (np.arange(8000, dtype="<u2") % 251).tofile("ids.bin")
        assert train("data.source=ids.bin", "run.name=ids").code == 0
        return Path("runs/ids")

    def test_it_has_no_words(self, token_run: Path) -> None:
        refused(invoke("sample", "ids"), 2, "without a tokenizer", "tokenizer.json")

    def test_it_exports_without_a_tokenizer(self, token_run: Path) -> None:
        done = invoke("export", "ids", "exported")
        assert done.code == 0
        assert "note: the run has no tokenizer" in done.err
        assert sorted(path.name for path in Path("exported").iterdir()) == ["config.json", "model.safetensors"]

    def test_a_tokenizer_that_is_put_there_gives_it_words(self, token_run: Path, trained: Path) -> None:
        shutil.copyfile(trained / "runs/done/tokenizer.json", token_run / "tokenizer.json")
        assert invoke("sample", "ids", "--prompt", "abc").out.startswith("abc")


GPT2 = (
    *("model.norm=layernorm", "model.position=learned", "model.activation=gelu-tanh", "model.bias=true"),
    "model.n_layers=2",
)
LLAMA = ("model.n_kv_heads=1", "model.rope.theta=5e5", "model.tied_embeddings=false", "model.n_layers=2")
QWEN3 = ("model.qk_norm=true", "model.n_kv_heads=1", "model.n_layers=2")
GEMMA2 = (
    *("model.norm=rmsnorm-offset", "model.post_norm=true", "model.activation=geglu-tanh", "model.logit_softcap=20"),
    *("model.scaled_embeddings=true", "model.sliding_window=8", "model.sliding_window_pattern=2", "model.n_layers=2"),
)
MIXTRAL = ("model.moe.n_experts=4", "model.moe.d_expert=24", "model.n_layers=2")
DEEPSEEK = (
    *("model.moe.n_experts=4", "model.moe.router=sigmoid", "model.moe.n_shared=1", "model.moe.n_dense_layers=1"),
    *("model.mla.kv_rank=8", "model.n_layers=2"),
)
BPE = ("data.tokenizer=bpe", "model.vocab_size=400")


class TestExport:
    @pytest.mark.parametrize(
        ("shape", "family", "tokenizer"),
        [
            (GPT2, "gpt2", ()),
            (LLAMA, "llama", ()),
            (GPT2, "gpt2", BPE),
            (LLAMA, "llama", BPE),
            (QWEN3, "qwen3", ()),
            (GEMMA2, "gemma2", ()),
            (MIXTRAL, "mixtral", ()),
            (DEEPSEEK, "deepseek_v3", ()),
        ],
        ids=["gpt2-bytes", "llama-bytes", "gpt2-bpe", "llama-bpe", "qwen3", "gemma2", "mixtral", "deepseek"],
    )
    def test_transformers_loads_it_and_agrees(
        self, train: Command, shape: tuple[str, ...], family: str, tokenizer: tuple[str, ...]
    ) -> None:
        assert train(*shape, *tokenizer, "optimizer.lr=1e-2").code == 0
        result = invoke("export", "tiny", "exported", "--json").result
        assert (result["family"], result["step"]) == (family, 4)
        assert set(result["files"]) == {path.name for path in Path("exported").iterdir()}
        theirs = AutoModelForCausalLM.from_pretrained("exported")
        words: Any = AutoTokenizer.from_pretrained("exported")
        ours, ids = our_model(Path("runs/tiny")), torch.tensor([words.encode(SENTENCES[0])])
        with torch.no_grad():
            difference = (theirs(ids).logits - our_logits(ours, ids)).abs().max()
        assert difference < 1e-5

    @pytest.mark.parametrize("tokenizer", [(), BPE], ids=["bytes", "bpe"])
    def test_its_tokenizer_gives_the_runs_ids(self, train: Command, tokenizer: tuple[str, ...]) -> None:
        from bptool.data.tokenizer import load_tokenizer

        train(*tokenizer)
        invoke("export", "tiny", "exported")
        ours, theirs = load_tokenizer(Path("runs/tiny/tokenizer.json")), AutoTokenizer.from_pretrained("exported")
        for sentence in SENTENCES[:2]:
            assert theirs.encode(sentence) == ours.encode(sentence).tolist()
            assert theirs.decode(theirs.encode(sentence)) == sentence
        if not tokenizer:
            assert theirs.encode("é") == list("é".encode())

    def test_what_no_family_can_express_is_refused_with_the_keys(self, train: Command) -> None:
        train("model.norm=none", "model.residual=false")
        refused(invoke("export", "tiny", "exported"), 2, "norm = 'none'", "residual")
        assert not Path("exported").exists()

    def test_a_folder_that_holds_something_is_left_alone_without_force(self, done_run: Path) -> None:
        Path("exported").mkdir()
        Path("exported/notes.txt").write_text("mine")
        refused(invoke("export", "done", "exported"), 2, "exported exists", "--force")
        assert [path.name for path in Path("exported").iterdir()] == ["notes.txt"]
        result = invoke("export", "done", "exported", "--force", "--json").result
        assert Path("exported/notes.txt").read_text() == "mine"
        assert "notes.txt" not in result["files"]

    def test_an_empty_folder_will_do(self, done_run: Path) -> None:
        Path("exported").mkdir()
        assert invoke("export", "done", "exported").code == 0

    def test_a_place_that_cannot_be_written(self, done_run: Path) -> None:
        refused(invoke("export", "done", "/proc/nowhere"), 3, "/proc/nowhere")

    def test_its_report(self, done_run: Path) -> None:
        lines = invoke("export", "done", "exported").out.splitlines()
        assert lines[0] == "exported holds a llama model"
        assert lines[2] == "  from   runs/done, step 6"
        assert lines[-1].startswith("  python -c ")


class TestWayBack:
    def test_training_goes_on_from_its_weights(self, train: Command, text: Path) -> None:
        """The first step's loss is about the run's last; a new model's would be ln 256 = 5.5."""
        train("training.steps=120", "optimizer.lr=1e-2", "evaluation.sequences=16")
        last = curve(Path("runs/tiny"), "val/loss")[-1][1]
        assert last < 3.6
        invoke("export", "tiny", "exported")
        settings = [setting for setting in SMALL if not setting.startswith("model.")]
        done = invoke("train", "exported", f"data.source={text}", "training.sequence_length=32", *settings, "--json")
        assert done.code == 0, done.err
        assert done.result["run"] == "runs/exported"
        assert curve(Path("runs/exported"), "train/loss")[0][1] == pytest.approx(last, abs=0.7)


def our_model(run: Path) -> torch.nn.Module:
    config = read_run_config(run)
    model = build(config.model, device="cpu", seed=0)
    load_model(model, CheckpointFolder(run / "checkpoints", keep=1).require_newest())
    return model.eval()


def our_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids)
    return logits
