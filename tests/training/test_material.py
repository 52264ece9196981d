from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_runs import CPU, small_config

from bptool.config.schema import Config
from bptool.config.target import CodeTarget
from bptool.model.transformer import build
from bptool.training.material import Material, open_material
from bptool.training.workload import Batch

MODEL = """
import torch
from bptool import Workload

def linear():
    return Workload(
        model=lambda: torch.nn.Linear(3, 1),
        batch=lambda generator: [{"x": torch.randn(4, 3, generator=generator)}, "a word"],
        loss=lambda model, batch: model(batch[0]["x"]).square().mean(),
    )
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(32 + i * i % 90) for i in range(3000)))
    return file


def material(config: Config, tmp_path: Path, code: CodeTarget | None = None) -> Material:
    return open_material(config, CPU, code=code, tokenizer_file=tmp_path / "tokenizer.json")


def tokens_of(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch["tokens"] for batch in batches])


class TestTokens:
    def test_the_split_into_micro_batches_does_not_change_a_steps_tokens(self, text: Path, tmp_path: Path) -> None:
        shape = {"data.source": str(text), "model.vocab_size": 256}
        splits = [(8, 1), (4, 2), (1, 8)]
        seen = []
        for size, count in splits:
            keys = {"training.micro_batch_size": size, "training.gradient_accumulation_steps": count}
            batches = list(material(small_config({**shape, **keys}), tmp_path).source.micro_batches(5))
            assert [len(batch["tokens"]) for batch in batches] == [size] * count
            seen.append(tokens_of(batches))
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], seen[2])

    def test_what_is_known_of_a_corpus(self, text: Path, tmp_path: Path) -> None:
        opened = material(small_config({"data.source": str(text), "model.vocab_size": 256}), tmp_path)
        assert opened.workload.unit == "tokens"
        assert opened.unigram_entropy is not None
        assert opened.flops_per_unit is not None
        assert opened.workload.weight(opened.held_out[0]) == opened.held_out[0]["targets"].numel()

    def test_the_tokenizer_is_kept_in_the_run(self, text: Path, tmp_path: Path) -> None:
        material(small_config({"data.source": str(text), "model.vocab_size": 256}), tmp_path)
        assert (tmp_path / "tokenizer.json").is_file()

    def test_a_sample_is_a_function_of_seed_and_step(self, text: Path, tmp_path: Path) -> None:
        changes = {"data.source": str(text), "model.vocab_size": 256, "evaluation.sample_tokens": 12}
        config = small_config({**changes, "evaluation.prompt": "ab"})
        write = material(config, tmp_path).sampler(build(config.model, device=CPU, seed=0))
        assert write is not None
        assert write(3) == write(3)
        assert write(3).startswith("ab")
        assert len({write(step) for step in range(4)}) > 1

    def test_no_sample_of_no_tokens(self, text: Path, tmp_path: Path) -> None:
        config = small_config({"data.source": str(text), "model.vocab_size": 256, "evaluation.sample_tokens": 0})
        assert material(config, tmp_path).sampler(build(config.model, device=CPU, seed=0)) is None


class TestOwnModel:
    @pytest.fixture(autouse=True)
    def _modules_and_paths_restored(self) -> Iterator[None]:
        path, modules = list(sys.path), set(sys.modules)
        yield
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            del sys.modules[name]

    @pytest.fixture
    def code(self, tmp_path: Path) -> CodeTarget:
        (tmp_path / "my_model.py").write_text(MODEL)
        return CodeTarget("linear", tmp_path / "my_model.py")

    def test_batches_are_functions_of_seed_step_and_place(self, code: CodeTarget, tmp_path: Path) -> None:
        config = small_config({"training.gradient_accumulation_steps": 2, "evaluation.sequences": 5})

        def batches(step: int, seed: int = 1) -> list[Batch]:
            keys = {"training.gradient_accumulation_steps": 2, "run.seed": seed}
            return list(material(small_config(keys), tmp_path, code).source.micro_batches(step))

        drawn = [batch[0]["x"] for step in (0, 1) for batch in batches(step)]
        drawn += [batch[0]["x"] for batch in material(config, tmp_path, code).held_out]
        drawn += [batches(0, seed=2)[0][0]["x"]]
        assert len({tuple(x.flatten().tolist()) for x in drawn}) == len(drawn) == 2 + 2 + 3 + 1
        assert torch.equal(batches(1)[1][0]["x"], drawn[3])
        assert batches(0)[0][1] == "a word"

    def test_what_is_not_known_of_it(self, code: CodeTarget, tmp_path: Path) -> None:
        opened = material(small_config(), tmp_path, code)
        assert (opened.unigram_entropy, opened.flops_per_unit) == (None, None)
        assert opened.sampler(opened.workload.model()) is None
        assert not (tmp_path / "tokenizer.json").exists()
