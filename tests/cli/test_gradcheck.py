"""`bptool gradcheck` as a user meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import invoke

SOURCE = """
import random
import torch
from torch import nn
from bptool import GradientTarget, Workload

class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        if ctx.factor is None:
            raise ValueError("no factor")  # raising in backward
        return grad * ctx.factor, None

def some(*shape):
    return torch.randn(shape, requires_grad=True)

def right():
    return GradientTarget(lambda x: Scaled.apply(x, 2.0), (some(4, 3),))

def wrong():
    return GradientTarget(lambda x, y: Scaled.apply(x, 2.001) * y, (some(4, 3), some(4, 3)))

def cut():
    return GradientTarget(lambda x, y: x.round() * y, (some(3), some(3)))

def module():
    print("hello from module")
    return GradientTarget(nn.Linear(3, 2), (torch.randn(5, 3),))

def workload():
    return Workload(
        model=lambda: nn.Linear(3, 2),
        batch=lambda generator: torch.randn(5, 3, generator=generator),
        loss=lambda model, x: model(x).square().mean(),
    )

def drawing():
    return GradientTarget(lambda x: x * random.random(), (some(3),))

def raising():
    return GradientTarget(lambda x: x @ x, (some(3, 4),))  # raising

def raising_in_backward():
    return GradientTarget(lambda x: Scaled.apply(x, None), (some(3),))

def changing():
    return GradientTarget(lambda x, y: x * y.mul_(2), (some(3), torch.randn(3)))

def huge():
    return GradientTarget(lambda x: x.expand(10**13, 10**4).contiguous(), (some(1, 1),))

def number():
    return 3
"""

LINE_OF_RAISING = next(i for i, line in enumerate(SOURCE.splitlines(), 1) if line.endswith("# raising"))


@pytest.fixture
def own(here: Path) -> Path:
    Path("mine.py").write_text(SOURCE)
    return here


def test_a_right_gradient(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:right", "--seed", "5")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "mine.py:right: no gradient is wrong (1 right), seed 5"
    assert lines[-1].strip().startswith("bptool ")
    assert "finite differences" in done.out


def test_a_wrong_one_is_named_on_the_last_line(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:wrong", "--seed", "5")
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[-1] == "not right: x (wrong)"
    assert next(line for line in lines if line.startswith("  x ")).split()[4:6] == ["wrong", "5.0e-04"]
    assert "bptool gradcheck mine.py:wrong --seed 5" in done.out


def test_the_contract(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:wrong", "--seed", "5", "--json")
    assert done.code == 1
    result = done.result
    assert (result["passed"], result["seed"], result["identities"]) == (False, 5, [])
    assert [tensor["name"] for tensor in result["tensors"]] == ["x", "y"]
    x = result["tensors"][0]
    assert x["relative_error"] == pytest.approx(5e-4, rel=1e-2)
    assert {key: x[key] for key in ("kind", "shape", "verdict", "location", "cut_by")} == {
        "kind": "input",
        "shape": [4, 3],
        "verdict": "wrong",
        "location": "everywhere",
        "cut_by": None,
    }
    assert x["error_bar"] < x["detectable_relative_error"] < 1e-8
    assert all({"name", "holds", "detail"} == set(probe) for probe in result["probes"])


def test_a_path_that_is_cut_is_told_and_is_no_failure(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:cut", "--json")
    assert done.code == 0
    x = done.result["tensors"][0]
    assert (x["verdict"], x["cut_by"], x["relative_error"]) == ("not_connected", "round", None)


def test_a_module_and_what_it_prints(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:module", "--json")
    assert done.code == 0
    assert "hello from module" in done.err
    assert [t["kind"] for t in json.loads(done.out)["result"]["tensors"]] == ["parameter", "parameter"]


def test_a_workload(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:workload", "--json")
    assert done.code == 0
    assert [t["name"] for t in done.result["tensors"]] == ["weight", "bias"]


def test_the_seed_is_fresh_and_can_be_given(own: Path) -> None:
    seeds = {invoke("gradcheck", "mine.py:right", "--json").result["seed"] for _ in range(2)}
    assert len(seeds) == 2
    first, again = (invoke("gradcheck", "mine.py:right", "--json", "--seed", "9").result for _ in range(2))
    assert first["tensors"] == again["tensors"]


def test_randomness_that_is_not_torchs(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:drawing")
    assert done.code == 1
    assert done.out.splitlines()[-1] == "not right: x (nondeterministic)"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raising", ["raised RuntimeError", f"line {LINE_OF_RAISING}, in <lambda>"]),
        ("raising_in_backward", ["backward raised ValueError: no factor", "in backward"]),
        ("changing", ["changes its input y in place"]),
        ("number", ["gave int, neither a GradientTarget nor a Workload"]),
        ("nothing", ["has no 'nothing'"]),
    ],
)
def test_mistakes_of_the_target(own: Path, name: str, words: list[str]) -> None:
    done = invoke("gradcheck", f"mine.py:{name}")
    assert (done.code, done.out) == (2, "")
    assert [word for word in words if word not in done.err] == []


def test_a_key_that_changes_nothing_is_refused(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:right", "training.steps=3")
    assert (done.code, done.out) == (2, "")
    assert "training.steps=3 changes nothing" in done.err


def test_what_does_not_fit_is_the_machines_no(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:huge")
    assert (done.code, done.out) == (3, "")
    assert "does not fit into memory in float64" in done.err


def test_other_commands_say_whose_target_it_is(own: Path) -> None:
    done = invoke("memory-estimate", "mine.py:right")
    assert done.code == 2
    assert "bptool gradcheck mine.py:right" in done.err


def test_the_built_in_transformer_and_what_was_cut(here: Path) -> None:
    small = ["model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.vocab_size=17"]
    done = invoke("gradcheck", *small, "training.device=cpu", "--json")
    assert done.code == 0
    result = done.result
    assert {tensor["verdict"] for tensor in result["tensors"]} == {"right"}
    assert result["sizes_cut"] == [
        "training.micro_batch_size from 8 to 2",
        "training.sequence_length from 256 to 64",
    ]
    assert result["cost"]["finite_differences_forwards_count"] == 2 * result["checked_count"]


def test_known_bugs_in_the_targets_own_backward(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:module", "--seed", "5", "--mutate")
    assert done.code == 0
    lines = done.out.splitlines()
    (summary,) = (line for line in lines if line.startswith("mutations: "))
    caught = [line for line in lines if line.startswith("  ") and "  caught  " in f"{line}  "]
    assert f"of {len(caught)} known bugs that change the gradient the check catches {len(caught)}" in summary
    assert re.search(r"  wrong sign +caught +2\.0e\+00\s+AddmmBackward0\[", done.out)
    assert "scaled_dot_product_attention" in done.out[done.out.index("not applicable:") :]


def test_known_bugs_in_the_contract(own: Path) -> None:
    result = invoke("gradcheck", "mine.py:module", "--seed", "5", "--mutate", "--json").result
    records = {one["name"]: one for one in result["mutations"]}
    assert set(records["counted twice"]) == {
        *("name", "op", "module", "outcome", "relative_error", "tensor", "detectable_relative_error", "detail")
    }
    assert records["counted twice"]["outcome"] == "caught"
    assert records["counted twice"]["relative_error"] == pytest.approx(1.0)
    assert invoke("gradcheck", "mine.py:module", "--seed", "5", "--json").result["mutations"] is None


def test_beside_a_wrong_gradient_no_bug_is_told(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:wrong", "--seed", "5", "--mutate", "--json")
    assert (done.code, done.result["mutations"]) == (1, [])
    assert any(text.startswith("mutations: none was made") for text in done.result["assumptions"])


def test_the_built_in_transformer_has_thirty_bugs_and_the_time_is_counted(here: Path) -> None:
    small = ["model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.vocab_size=17"]
    result = invoke("gradcheck", *small, "training.device=cpu", "--mutate", "--json").result
    caught = [one["name"] for one in result["mutations"] if one["outcome"] == "caught"]
    assert len(caught) >= 50
    assert {"mask off by one", "scale dropped in dQ", "one head forgotten"} <= set(caught)
    cost = result["cost"]
    assert cost["identities_s"] > 0
    assert cost["mutations_s"] > 0
    assert cost["check_s"] > cost["identities_s"] + cost["mutations_s"]


def test_a_long_wait_is_announced(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bptool.analysis.gradcheck import answers

    assert "so this takes about" not in invoke("gradcheck", "mine.py:workload").err
    monkeypatch.setattr(answers, "LONG_S", 0.0)
    assert "in float64, so this takes about" in invoke("gradcheck", "mine.py:workload").err


def test_the_page_is_written_and_never_over_another_file(own: Path) -> None:
    done = invoke("gradcheck", "mine.py:wrong", "--seed", "5", "--html", "page.html")
    assert (done.code, "wrote page.html" in done.err) == (1, True)
    assert "Not right: x (wrong)." in Path("page.html").read_text("utf-8")
    refused = invoke("gradcheck", "mine.py:right", "--html", "page.html")
    assert (refused.code, refused.out) == (2, "")
    assert "--force" in refused.err
    assert invoke("gradcheck", "mine.py:right", "--html", "page.html", "--force").code == 0
    assert "No gradient is wrong." in Path("page.html").read_text("utf-8")
