"""Hugging Face's weights for the models that bptool builds: a folder of safetensors and a config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bptool.config.huggingface import huggingface_config
from bptool.config.schema import ModelSettings
from bptool.errors import StorageError, UsageError
from bptool.files import replacing, writing
from bptool.interop.huggingface_names import HEAD, Entry, Names, names_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_AT_MOST_NAMED = 5


def load_weights(folder: Path, settings: ModelSettings) -> dict[str, Tensor]:
    """The weights in `folder`, under the names of `Transformer(settings)` and in the dtype that they are kept in.

    All names and shapes are checked before any weights are read.

    Raises:
        UsageError: no safetensors there, a file that is none, or weights of another model than `settings` describe.
        StorageError: a file cannot be read.
    """
    names = names_of(settings)
    entries = names.entries(settings)
    files = _weight_files(folder)
    held = {names.full(name): shape for path in files for name, shape in _header(path).items()}
    ours = {name: shape for name, shape in held.items() if name in entries or not names.passed_over(name)}
    if settings.tied_embeddings:
        ours.pop(HEAD, None)
    _check(folder, entries, ours)
    tensors = _read(files, names, {*entries, HEAD})
    head = tensors.pop(HEAD, None) if settings.tied_embeddings else None
    weights = _assembled(entries, tensors)
    if head is not None and not torch.equal(head, weights["embedding.weight"]):
        raise UsageError(
            f"model.tied_embeddings = true, but the weights in {folder} have a head that is not the embedding",
            "set model.tied_embeddings=false",
        )
    return weights


def save_weights(state_dict: Mapping[str, Tensor], settings: ModelSettings, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, which `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Files of these names are replaced, both or none; the config comes last, so that a folder that a kill cut short is
    not taken for a model.

    Raises:
        UsageError: no Hugging Face family can express `settings`.
        StorageError: the folder or a file cannot be written.
    """
    config = huggingface_config(settings)
    tensors = {name: entry.to_theirs(state_dict) for name, entry in names_of(settings).entries(settings).items()}
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "config.json") as description:
            description.write_text(json.dumps(config, indent=2) + "\n")
            with replacing(folder / WEIGHTS) as weights:
                save_file(tensors, weights, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StorageError(f"{folder / WEIGHTS} could not be written: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those that its index names, or the only one."""
    if not folder.is_dir():
        raise UsageError(f"model.weights = '{folder}': there is no such folder")
    if (folder / INDEX).is_file():
        return _indexed_files(folder / INDEX)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise UsageError(
            f"{folder} holds its weights as {_listed(pickles)}: a pickle, which can run code while it is read;"
            " bptool reads safetensors only",
            "save the model again with transformers' save_pretrained, which writes safetensors",
        )
    raise UsageError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX} is there")


def _indexed_files(index: Path) -> list[Path]:
    try:
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [index.parent / Path(name).name for name in named]
    except OSError as error:
        raise StorageError(f"cannot read {index}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{index} is no index of safetensors files: it needs a 'weight_map' of names to files"
        ) from error
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UsageError(f"{index} names files that are not beside it: {_listed(missing)}")
    return files


def _opened(path: Path) -> Any:
    """The open safetensors file, for a `with`; `safe_open` has no type of its own."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UsageError(f"{path} is not a safetensors file, or is cut short: {error}") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape, by the name that the file has for it."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no dictionary


def _read(files: Sequence[Path], names: Names, wanted: Set[str]) -> dict[str, Tensor]:
    """The wanted tensors, by full name."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with _opened(path) as file:
            held = {names.full(name): name for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            tensors |= {full: file.get_tensor(held[full]) for full in held.keys() & wanted}
    return tensors


def _assembled(entries: Mapping[str, Entry], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters, from their tensors, which are taken out; experts become one tensor."""
    weights: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, entry in entries.items():
        parts = entry.to_ours(tensors.pop(name))
        if entry.expert is None:
            weights |= parts
        else:
            experts.setdefault(entry.ours[0], []).append(parts[entry.ours[0]])
    return weights | {name: torch.stack(parts) for name, parts in experts.items()}


def _check(folder: Path, entries: Mapping[str, Entry], held: Mapping[str, tuple[int, ...]]) -> None:
    problems = []
    if missing := [name for name in entries if name not in held]:
        problems.append(f"missing: {_listed(missing)}")
    if unexpected := [name for name in held if name not in entries]:
        problems.append(f"not of this model: {_listed(unexpected)}")
    wrong = [
        f"{name} is {list(held[name])} and not {list(entry.shape)}"
        for name, entry in entries.items()
        if held.get(name, entry.shape) != entry.shape
    ]
    if wrong:
        problems.append(f"of another shape: {_listed(wrong)}")
    if problems:
        raise UsageError(
            "\n".join([f"the weights in {folder} are not those of [model]:", *(f"  {one}" for one in problems)]),
            f"take the model's settings from {folder / 'config.json'}",
        )


def _listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _AT_MOST_NAMED
    return ", ".join(names[:_AT_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
