"""The seed of each evaluation is what PyTorch would make of it, and costs next to nothing."""

from __future__ import annotations

import subprocess
import sys

import torch

from bptool.analysis.gradcheck.random_state import seed_generators


def test_the_numbers_are_those_of_pytorchs_own_seed() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = torch.randn(5), torch.randperm(9)
        torch.rand(2)
        seed_generators(3)
        assert all(map(torch.equal, (torch.randn(5), torch.randperm(9)), expected))


def test_a_check_does_not_load_symbolic_mathematics() -> None:
    """In a fresh interpreter: sympy takes ten times as long as the check of a small function."""
    program = (
        "import sys, torch\n"
        "from bptool import GradientTarget\n"
        "from bptool.analysis.gradcheck.check import check_gradients\n"
        "result = check_gradients(GradientTarget(torch.sin, [torch.randn(3, 4, requires_grad=True)]), seed=0)\n"
        "assert result.passed and len(result.probes) > 5\n"
        "sys.exit('sympy is loaded' if 'sympy' in sys.modules else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
