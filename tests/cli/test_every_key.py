"""No key of the config does nothing: each is changed, and something that a user can see must change with it."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command_line import SMALL, Done, checkpoints, curve, invoke, weights

from bptool.config.keys import all_keys


class Seen(NamedTuple):
    """A command that ended, and the only run below the folder where it was started."""

    done: Done
    run: Path

    def result(self, key: str) -> Any:
        return json.loads((self.run / "result.json").read_text())["result"][key]


def events(seen: Seen) -> bytes:
    return b"".join(path.read_bytes() for path in seen.run.glob("events.*"))


# What a user can see: in the printed text, in the run's folder, or in result.json.
LOOKS: Mapping[str, Callable[[Seen], object]] = {
    "exit code": lambda seen: seen.done.code,
    "place": lambda seen: seen.run.parts[-2:],
    "files": lambda seen: sorted(path.name.partition(".tfevents")[0] for path in seen.run.iterdir()),
    "losses": lambda seen: curve(seen.run, "train/loss"),
    "held-out losses": lambda seen: curve(seen.run, "val/loss"),
    "learning rates": lambda seen: curve(seen.run, "train/lr"),
    "weights": lambda seen: weights(seen.run),
    "size": lambda seen: seen.result("parameters_count"),
    "predicted memory": lambda seen: seen.result("predicted_peak_bytes"),
    "sample": lambda seen: seen.result("sample"),
    "samples": lambda seen: seen.done.err.count("sample at step"),
    "checkpoints": lambda seen: checkpoints(seen.run),
    "histograms": lambda seen: sorted(set(re.findall(rb"gradients/[\w.]+", events(seen)))),
}


class Case(NamedTuple):
    """`KEY=value`, what must look different with it, and the settings without which the key means nothing."""

    value: str
    look: str
    given: tuple[str, ...] = ()


LLAMA3 = ("model.rope.scaling=llama3", "model.rope.original_context_length=64")
YARN = ("model.rope.scaling=yarn", "model.rope.original_context_length=4096")
WINDOW = ("model.sliding_window=4",)
LATENT = ("model.mla.kv_rank=8",)
EXPERTS = ("model.moe.n_experts=4", "model.moe.d_expert=8")
SGD = ("optimizer.name=sgd",)
DIVERGING = ("optimizer.name=gradient-descent", "optimizer.lr=1e20", "training.clip_norm=0")
CASES = {
    "run.name": Case("other", "place"),
    "run.directory": Case("elsewhere", "place"),
    "run.seed": Case("1", "losses"),
    "run.workload": Case("my_model.py:vit", "exit code"),
    "model.n_layers": Case("2", "size"),
    "model.d_model": Case("16", "size"),
    "model.n_heads": Case("4", "losses"),
    "model.n_kv_heads": Case("1", "size"),
    "model.head_dim": Case("8", "size"),
    "model.d_ff": Case("64", "size"),
    "model.vocab_size": Case("300", "size"),
    "model.context_length": Case("64", "size", ("model.position=learned", "training.sequence_length=32")),
    "model.norm": Case("none", "losses"),
    "model.norm_eps": Case("0.1", "losses"),
    "model.post_norm": Case("true", "size"),
    "model.position": Case("none", "losses"),
    "model.rope.theta": Case("100.0", "losses"),
    "model.rope.local_theta": Case("100.0", "losses", WINDOW),
    "model.rope.scaling": Case("llama3", "losses", LLAMA3[1:]),
    "model.rope.factor": Case("2.0", "losses", LLAMA3),
    "model.rope.low_frequency_factor": Case("2.0", "losses", LLAMA3),
    "model.rope.high_frequency_factor": Case("8.0", "losses", LLAMA3),
    "model.rope.original_context_length": Case("16", "losses", LLAMA3[:1]),
    "model.rope.beta_fast": Case("200.0", "losses", YARN),
    "model.rope.beta_slow": Case("8.0", "losses", YARN),
    "model.rope.mscale": Case("2.0", "losses", YARN),
    "model.rope.mscale_all_dim": Case("1.0", "losses", (*YARN, "model.mla.kv_rank=8")),
    "model.sliding_window": Case("4", "losses"),
    "model.sliding_window_pattern": Case("1", "losses", WINDOW),
    "model.query_scale_dim": Case("1", "losses"),
    "model.attention_softcap": Case("0.1", "losses"),
    "model.activation": Case("relu", "losses"),
    "model.mla.kv_rank": Case("8", "size"),
    "model.mla.q_rank": Case("8", "size", LATENT),
    "model.mla.nope_dim": Case("4", "size", LATENT),
    "model.mla.rope_dim": Case("4", "size", LATENT),
    "model.mla.value_dim": Case("4", "size", LATENT),
    "model.moe.n_experts": Case("4", "size"),
    "model.moe.n_active": Case("1", "losses", EXPERTS),
    "model.moe.d_expert": Case("16", "size", EXPERTS),
    "model.moe.n_shared": Case("1", "size", EXPERTS),
    "model.moe.n_dense_layers": Case("1", "size", (*EXPERTS, "model.n_layers=2")),
    "model.moe.router": Case("sigmoid", "losses", EXPERTS),
    "model.moe.normalized": Case("false", "losses", EXPERTS),
    "model.moe.weight_scale": Case("3.0", "losses", EXPERTS),
    "model.moe.n_groups": Case("2", "losses", EXPERTS),
    "model.moe.n_active_groups": Case("2", "losses", (*EXPERTS, "model.moe.n_groups=2")),
    "model.moe.auxiliary_loss": Case("0.0", "losses", EXPERTS),
    "model.bias": Case("true", "size"),
    "model.qkv_bias": Case("true", "size"),
    "model.qk_norm": Case("true", "size"),
    "model.scaled_embeddings": Case("true", "losses"),
    "model.logit_softcap": Case("1.0", "losses"),
    "model.tied_embeddings": Case("false", "size"),
    "model.dropout": Case("0.5", "losses"),
    "model.residual": Case("false", "losses"),
    "model.attention": Case("eager", "predicted memory"),
    "model.weights": Case("EXPORTED", "losses"),
    "model.init_std": Case("0.1", "losses"),
    "data.source": Case("TEXT", "losses"),
    "data.tokenizer": Case("bpe", "losses", ("model.vocab_size=300",)),
    "data.validation_fraction": Case("0.3", "held-out losses"),
    "training.steps": Case("3", "losses"),
    "training.micro_batch_size": Case("1", "losses"),
    "training.gradient_accumulation_steps": Case("2", "losses"),
    "training.sequence_length": Case("16", "losses"),
    "training.clip_norm": Case("0.01", "weights", SGD),
    "training.loss": Case("plain", "predicted memory"),
    "training.device": Case("cuda:77", "exit code"),
    "training.compile": Case("true", "exit code"),  # without a compiler, see below
    "optimizer.name": Case("sgd", "weights"),
    "optimizer.lr": Case("1e-4", "learning rates"),
    "optimizer.weight_decay": Case("0.5", "weights"),
    "optimizer.beta1": Case("0.5", "weights"),
    "optimizer.beta2": Case("0.5", "weights"),
    "optimizer.eps": Case("1e-2", "weights"),
    "optimizer.momentum": Case("0.5", "weights", SGD),
    "optimizer.nesterov": Case("false", "weights", SGD),
    # A list of tensors at once takes a copy of the largest weights; with fewer tokens the step's peak is there.
    "optimizer.implementation": Case(
        "foreach", "predicted memory", ("training.micro_batch_size=1", "training.sequence_length=8")
    ),
    "schedule.name": Case("constant", "learning rates"),
    "schedule.warmup_steps": Case("1", "learning rates"),
    "schedule.final_lr_fraction": Case("0.5", "learning rates"),
    "schedule.decay_fraction": Case("0.5", "learning rates", ("schedule.name=wsd",)),
    "precision.mode": Case("bf16", "weights"),
    "precision.bf16_update": Case("stochastic", "weights", ("precision.mode=bf16",)),
    "activation_checkpoint.policy": Case("full", "predicted memory", ("model.n_layers=3",)),
    "activation_checkpoint.every": Case(
        "3", "predicted memory", ("model.n_layers=4", "activation_checkpoint.policy=every_k")
    ),
    "activation_checkpoint.budget": Case(
        "1GiB",
        "predicted memory",
        ("model.n_layers=3", "activation_checkpoint.policy=budget", "activation_checkpoint.budget=400KiB"),
    ),
    "activation_checkpoint.plan": Case(
        "2*none+full",
        "predicted memory",
        ("model.n_layers=3", "activation_checkpoint.policy=plan", "activation_checkpoint.plan=3*full"),
    ),
    "checkpoint.every": Case("1", "checkpoints"),
    "checkpoint.keep": Case("1", "checkpoints", ("checkpoint.every=1",)),
    "evaluation.every": Case("1", "held-out losses"),
    "evaluation.sequences": Case("1", "held-out losses"),
    "evaluation.sample_every": Case("1", "samples"),
    "evaluation.sample_tokens": Case("9", "sample"),
    "evaluation.prompt": Case("class", "sample"),
    "evaluation.temperature": Case("0", "sample"),
    "evaluation.top_k": Case("1", "sample"),
    "logging.every": Case("2", "losses", ("evaluation.every=0",)),
    "logging.tensorboard": Case("false", "files"),
    "logging.gradient_histograms_every": Case("1", "histograms"),
    "gradients.on_nonfinite": Case("skip", "exit code", DIVERGING),
}


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """Weights for the model of `SMALL`."""
    folder = trained / "exported"
    assert invoke("export", str(trained / "runs/done"), str(folder)).code == 0
    return folder


@functools.cache
def seen(text: Path, predicted: bool, *settings: str) -> Seen:
    """Train with these settings, once, in a folder of its own; to predict the memory takes most of the time."""
    folder = Path(tempfile.mkdtemp(dir=text.parent))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if not predicted:
            patch.setattr("bptool.analysis.train.check_fit", lambda question: None)
        done = invoke("train", *SMALL, f"data.source={text}", *settings)
    runs = [path.parent.relative_to(folder) for path in folder.glob("*/*/config.json")]
    return Seen(done, folder / runs[0] if runs else folder)


def test_every_key_is_here() -> None:
    assert list(CASES) == list(all_keys())


@pytest.mark.parametrize("key", CASES)
def test_it_shows(key: str, here: Path, text: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    other_text = text.with_name("other.txt")
    other_text.write_text(text.read_text()[::-1])
    case = CASES[key]
    value = {"EXPORTED": str(exported), "TEXT": str(other_text)}.get(case.value, case.value)
    predicted = case.look == "predicted memory"
    without = seen(text, predicted, *case.given)
    with_it = seen(text, predicted, *case.given, f"{key}={value}")
    if case.look != "exit code":
        assert (without.done.code, with_it.done.code) == (0, 0), with_it.done.err
    look = LOOKS[case.look]
    assert look(without) != look(with_it)
