"""The backward visits the layers from the loss to the embedding: seen by hooks on what each of them gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bptool.analysis.gradcheck.identities.identity import Agreement, Identity, as_identity
from bptool.model.transformer import Transformer
from bptool.training.workload import Workload

NAME = "layer_order"


class LayerOrder:
    """Writes down in which order gradients arrive at the outputs of some layers.

    Args:
        layers: from the embedding to the loss.
        all_arrive: whether a layer without a gradient is wrong, or just not on the way to this loss.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, all_arrive: bool) -> None:
        self._layers = list(layers)
        self._all_arrive = all_arrive
        self._called: list[str] = []
        self._arrived: list[str] = []
        self._given: list[Tensor] = []
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in layers.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple | list) and output else output
            if name in self._called or not isinstance(tensor, Tensor) or not tensor.requires_grad:
                return
            if not any(tensor is given for given in self._given):  # what passes its input on has no place of its own
                self._given.append(tensor)
                self._called.append(name)
                tensor.register_hook(lambda gradient: self._arrived.append(name))

        return see

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def identity(self) -> Identity:
        """After the backward."""
        expected = list(reversed(self._layers if self._all_arrive else self._called))
        if not self._all_arrive:
            expected = [name for name in expected if name in self._arrived]
        right = self._arrived == expected
        out_of_place = sum(a != b for a, b in zip(self._arrived, expected, strict=False))
        out_of_place += abs(len(expected) - len(self._arrived))
        error = out_of_place / len(expected) if expected else math.inf
        where = f"gradients came to {_chain(self._arrived)}" + _missing(expected, self._arrived)
        detail = f"the backward goes from the loss to the embedding: {_chain(expected)}"
        agreement = Agreement(right, 0.0 if right else error, 0.0, where)
        return as_identity(NAME, [agreement], detail)


def layers_of_transformer(model: Transformer) -> dict[str, nn.Module]:
    """From the embedding to the loss."""
    blocks = {f"blocks.{number}": block for number, block in enumerate(model.blocks)}
    norm = {} if isinstance(model.final_norm, nn.Identity) else {"final_norm": model.final_norm}
    return {"embedding": model.embedding, **blocks, **norm, "loss": model.loss}


def layers_of_workload(workload: Workload, model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks, under the model's names for them."""
    names = {module: name for name, module in model.named_modules()}
    return {names.get(block, f"block {number}"): block for number, block in enumerate(workload.blocks(model))}


def _chain(names: Sequence[str]) -> str:
    shown = list(names) if len(names) <= 8 else [*names[:4], "...", *names[-3:]]
    return " -> ".join(shown) or "nothing"


def _missing(expected: Sequence[str], arrived: Sequence[str]) -> str:
    lost = [name for name in expected if name not in arrived]
    return f"; none came to {', '.join(lost)}" if lost else ""
