from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from bptool.config.loading import load_config
from bptool.config.target import CodeTarget, resolve_target
from bptool.errors import ResumeError, TargetError
from bptool.training.user_code import describe, load_workload, users_errors
from bptool.training.workload import Workload

GOOD = """
    import torch
    from bptool import Workload

    def linear():
        return Workload(
            model=lambda: torch.nn.Linear(3, 1),
            batch=lambda generator: {"x": torch.randn(4, 3, generator=generator)},
            loss=lambda model, batch: model(batch["x"]).square().mean(),
        )
"""


@pytest.fixture(autouse=True)
def _modules_and_paths_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def written(name: str, text: str) -> Path:
    Path(name).parent.mkdir(exist_ok=True, parents=True)
    Path(name).write_text(dedent(text))
    return Path(name)


def target_of(text: str) -> CodeTarget:
    target = resolve_target(text)
    assert isinstance(target, CodeTarget)
    return target


def error_of(text: str) -> TargetError:
    with pytest.raises(TargetError) as caught:
        load_workload(target_of(text))
    return caught.value


class TestFound:
    def test_in_a_file(self) -> None:
        written("my_model.py", GOOD)
        workload = load_workload(target_of("my_model.py:linear"))
        model = workload.model()
        loss = workload.loss(model, workload.batch(torch.Generator().manual_seed(0)))
        assert loss.shape == ()
        assert workload.unit == "micro-batches"

    def test_in_a_module_of_the_current_folder(self) -> None:
        written("package/inner.py", GOOD)
        written("package/__init__.py", "")
        assert isinstance(load_workload(target_of("package.inner:linear")), Workload)

    def test_a_workload_that_is_there_already(self) -> None:
        written("my_model.py", GOOD + "\n    ready = linear()\n")
        assert isinstance(load_workload(target_of("my_model.py:ready")), Workload)

    def test_files_beside_it_are_found_as_python_finds_them(self) -> None:
        written("deep/helper.py", "WIDTH = 3\n")
        written("deep/my_model.py", "import helper\nassert helper.WIDTH == 3\n" + dedent(GOOD))
        assert isinstance(load_workload(target_of("deep/my_model.py:linear")), Workload)

    @pytest.mark.parametrize("name", ["json.py", "torch.py", "my-model.v2.py"])
    def test_whatever_the_file_is_called(self, name: str) -> None:
        before = sys.modules["json"], sys.modules["torch"]
        written(f"deep/{name}", GOOD)
        assert isinstance(load_workload(target_of(f"deep/{name}:linear")), Workload)
        assert (sys.modules["json"], sys.modules["torch"]) == before

    def test_nothing_runs_when_a_target_is_only_parsed(self) -> None:
        written("my_model.py", "raise SystemExit('run')\n")
        assert load_config(target_of("my_model.py:linear"), []).run.workload == "my_model.py:linear"


class TestMistakes:
    def test_an_error_names_its_own_file_and_line(self) -> None:
        written("my_model.py", "def vit():\n    width = 3\n    raise ValueError(f'no width {width}')\n")
        error = error_of("my_model.py:vit")
        file = Path("my_model.py").resolve()
        assert error.message == f"my_model.py:vit raised ValueError: no width 3 ({file}, line 3, in vit)"
        assert isinstance(error.__cause__, ValueError)

    def test_an_error_while_it_is_imported(self) -> None:
        written("my_model.py", "x = 1\ny = x / 0\n")
        message = error_of("my_model.py:vit").message
        assert "ZeroDivisionError: division by zero" in message
        assert message.endswith("my_model.py, line 2, in <module>)")

    def test_an_error_inside_a_library_names_the_users_line(self) -> None:
        written("my_model.py", "import torch\ndef vit():\n    return torch.zeros(2) @ torch.zeros(3)\n")
        written("other.py", "import json\ndef vit():\n    return json.loads('{')\n")
        assert error_of("my_model.py:vit").message.endswith("my_model.py, line 3, in vit)")
        assert error_of("other.py:vit").message.endswith("other.py, line 3, in vit)")

    def test_a_module_that_there_is_not(self) -> None:
        written("my_model.py", "\nimport no_such_module\n")
        message = error_of("my_model.py:vit").message
        assert "No module named 'no_such_module'" in message
        assert message.endswith("my_model.py, line 2, in <module>)")
        assert "No module named 'no_such_package'" in error_of("no_such_package.inner:vit").message

    def test_a_file_that_is_no_python(self) -> None:
        written("my_model.py", "x = 1\ndef vit(:\n")
        message = error_of("my_model.py:vit").message
        assert "SyntaxError" in message
        assert "(my_model.py, line 2)" in message
        assert "importlib" not in message

    def test_a_script_that_leaves_by_itself(self) -> None:
        written("my_model.py", "import sys\nsys.exit(3)\n")
        message = error_of("my_model.py:vit").message
        assert "SystemExit: 3" in message
        assert message.endswith("my_model.py, line 2, in <module>)")

    def test_a_missing_name_and_the_nearest(self) -> None:
        written("my_model.py", GOOD)
        error = error_of("my_model.py:linaer")
        assert error.message == "my_model.py has no 'linaer', did you mean 'linear'?"

    def test_something_else_than_a_workload(self) -> None:
        written("my_model.py", "def vit():\n    return 3\nmodel = [1]\n")
        assert error_of("my_model.py:vit").message == "my_model.py:vit gave int, not a Workload"
        assert error_of("my_model.py:model").message == "my_model.py:model gave list, not a Workload"
        assert "bptool.Workload(model=..., batch=..., loss=...)" in error_of("my_model.py:vit").remedy

    def test_an_interrupt_is_no_mistake(self) -> None:
        written("my_model.py", "raise KeyboardInterrupt\n")
        with pytest.raises(KeyboardInterrupt):
            load_workload(target_of("my_model.py:vit"))


class TestLoss:
    @pytest.mark.parametrize(
        ("expression", "message"),
        [
            ("model(batch['x'])", r"its loss is of shape \[4, 1\], not a scalar tensor"),
            ("1.5", "its loss is a float, not a scalar tensor"),
            ("model(batch['x']).mean().detach()", "depends on no parameter that requires a gradient"),
        ],
    )
    def test_that_no_backward_can_begin_from(self, expression: str, message: str) -> None:
        written("my_model.py", GOOD.replace('model(batch["x"]).square().mean()', expression))
        workload = load_workload(target_of("my_model.py:linear"))
        with pytest.raises(TargetError, match=message):
            workload.loss(workload.model(), workload.batch(torch.Generator()))

    def test_evaluation_needs_no_gradient(self) -> None:
        written("my_model.py", GOOD)
        workload = load_workload(target_of("my_model.py:linear"))
        with torch.no_grad():
            assert workload.loss(workload.model(), workload.batch(torch.Generator())) >= 0


class TestWhileItRuns:
    def test_an_error_that_passes_the_users_lines_is_theirs(self) -> None:
        written("my_model.py", GOOD.replace("torch.randn(4, 3", "torch.randn(4, 2"))
        target = target_of("my_model.py:linear")
        workload = load_workload(target)
        with (
            pytest.raises(TargetError, match=r"RuntimeError: mat1 and mat2.*my_model\.py, line 9, in <lambda>\)"),
            users_errors(target),
        ):
            workload.loss(workload.model(), workload.batch(torch.Generator()))

    def test_an_error_of_ours_stays_ours(self) -> None:
        written("my_model.py", GOOD)
        with pytest.raises(ResumeError), users_errors(target_of("my_model.py:linear")):
            raise ResumeError("ours")

    def test_without_users_code_there_is_no_mistake_of_theirs(self) -> None:
        with pytest.raises(ZeroDivisionError), users_errors(None):
            raise ZeroDivisionError


def test_an_error_that_was_never_raised_is_described_too() -> None:
    assert describe(ValueError("plain")) == "ValueError: plain"
