"""PyTorch's compiler is loaded when it is used, and works as ever then. Each case needs a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

START = """
import sys, torch
from bptool.training.postponed_compiler import postpone_compiler
postpone_compiler()

def loaded():
    return "torch._dynamo.eval_frame" in sys.modules
"""


def run(program: str) -> None:
    text = textwrap.dedent(START) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_prediction_does_without() -> None:
    """Fake tensors, an optimizer and recomputation import it, and use nothing of it."""
    run("""
    from bptool.analysis.memory.simulation import simulate
    from bptool.config.overrides import override
    from bptool.config.schema import Config
    from bptool.training.workload import transformer_workload
    small = {"model.n_layers": 2, "model.d_model": 32, "activation_checkpoint.policy": "full"}
    config = override(Config(), small)
    simulate(config, transformer_workload(config))
    assert "torch._dynamo" in sys.modules and not loaded()
    """)


def test_a_step_in_earnest_does_without_and_compiles_later() -> None:
    run("""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    def step():
        weight.grad = torch.ones(3)
        optimizer.step()
        optimizer.zero_grad()
    step()
    assert not loaded()
    module = sys.modules["torch._dynamo"]
    double = torch.compile(lambda x: x.sin() * 2, backend="eager")
    assert torch.equal(double(torch.ones(3)), torch.ones(3).sin() * 2)
    assert loaded() and sys.modules["torch._dynamo"] is torch._dynamo is module
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    step()
    assert torch.equal(weight.detach(), torch.zeros(3))
    """)


def test_recomputation_in_earnest_does_without() -> None:
    """It takes the settings for imported."""
    run("""
    from torch.utils.checkpoint import checkpoint
    layer = torch.nn.Linear(3, 3)
    checkpoint(layer, torch.ones(2, 3), use_reentrant=False).sum().backward()
    assert layer.weight.grad is not None
    assert "torch._dynamo.config" in sys.modules and not loaded()
    """)


def test_pytorchs_own_functions_are_hidden_from_a_compiler_that_comes_later() -> None:
    """An optimizer's update is run without it first, and then within what is compiled."""
    run("""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    inner = torch.optim.Optimizer.zero_grad.__wrapped__
    assert inner.__dynamo_disable is inner
    import torch._dynamo.testing
    torch.compile(optimizer.zero_grad, backend="eager")(set_to_none=False)
    assert loaded()
    assert getattr(inner, "__dynamo_disable", None) is not inner
    """)


@pytest.mark.parametrize("decorator", ["torch._dynamo.disable", "torch.compiler.disable"])
def test_what_a_user_hides_from_the_compiler_stays_hidden(decorator: str) -> None:
    run(f"""
    import torch._dynamo
    @{decorator}
    def hidden(x):
        return x.cos()
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    compiled = torch.compile(lambda x: hidden(x.sin()) + 1, backend=backend)
    assert torch.equal(compiled(torch.ones(2)), torch.ones(2).sin().cos() + 1)
    assert len(graphs) == 2
    assert not any("cos" in str(graph.graph) for graph in graphs)
    """)


@pytest.mark.parametrize(
    "use",
    ["import torch._dynamo.utils", "from torch._dynamo import utils", "from torch._dynamo.exc import Unsupported"],
)
def test_its_other_modules_come_after_it(use: str) -> None:
    run(f"""
    import torch._dynamo.config
    assert not loaded()
    settings = torch._dynamo.config
    {use}
    assert loaded() and torch._dynamo.config is settings
    """)


def test_where_it_is_loaded_nothing_happens() -> None:
    program = """
    import sys, torch._dynamo
    before = list(sys.meta_path)
    from bptool.training.postponed_compiler import postpone_compiler
    postpone_compiler()
    assert sys.meta_path == before
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
