"""A run's plan for its budget of activations, kept in its folder.

It is found when the run begins, by times that differ from hour to hour; each continuation recomputes what the run did.
"""

from __future__ import annotations

import json
from typing import Any

from bptool.analysis.activation_budget.operation_costs import Costs
from bptool.analysis.activation_budget.planning import Settled, settled, with_blocks
from bptool.analysis.machine import Machine
from bptool.config.block_plan import parse_plan, write_plan
from bptool.config.keys import dotted
from bptool.config.schema import Config
from bptool.training.run_folder import RunFolder
from bptool.training.workload import Workload

PLAN = "activation_plan.json"
_DEPENDS_ON = (
    *("activation_checkpoint.", "model.", "precision.", "run.workload"),
    *("training.micro_batch_size", "training.sequence_length", "training.loss", "training.device"),
    "training.compile",
)
"""Keys, or the beginnings of keys, that the plan was found for; under others it is found anew."""


def settled_once(
    folder: RunFolder, config: Config, workload: Workload, machine: Machine, costs: Costs, *, resumed: bool
) -> Settled:
    """The same step with a plan in the place of a budget: the run's own, where it has one for these settings.

    Raises:
        BudgetTooSmall: even the most frugal plan holds more.
        TargetError: the user's model does what fake tensors cannot.
        StorageError: the plan could not be kept.
    """
    if config.activation_checkpoint.policy != "budget":
        return Settled(config, workload, None)
    asked = _asked(config)
    known = _read(folder) if resumed else {}
    if known.get("settings") == asked:
        return Settled(with_blocks(config, parse_plan(known["plan"])), workload, None)
    found = settled(config, workload, machine, costs)
    assert found.planned is not None, "a budget was asked for"
    plan = write_plan(found.planned.plan.policies)
    folder.write(PLAN, {"settings": asked, "plan": plan, "basis": found.planned.basis})
    return found


def _asked(config: Config) -> dict[str, Any]:
    """As JSON has it."""
    chosen = {key: value for key, value in dotted(config).items() if key.startswith(_DEPENDS_ON)}
    return dict(json.loads(json.dumps(chosen, default=str)))


def _read(folder: RunFolder) -> dict[str, Any]:
    """Nothing where the run is older than its plan, or the file is no longer what was written."""
    try:
        known = json.loads((folder.path / PLAN).read_text())
        parse_plan(str(known["plan"]))
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return dict(known)
