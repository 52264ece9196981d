"""`bptool memory-estimate` as a user meets it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from command_line import Done, invoke

TINY = ("tiny", "model.n_layers=2", "model.d_model=64", "training.micro_batch_size=2")
OWN_MODEL = """
import torch
from torch import nn
from bptool import Workload

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 4)
    def forward(self, x):
        hidden = self.first(x).relu()
        READS
        return self.last(hidden)

def net():
    return Workload(
        model=Net,
        batch=lambda generator: {"x": torch.randn(8, 16, generator=generator), "y": torch.arange(8) % 4},
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["y"]),
    )
"""


def estimate(*arguments: str) -> Done:
    return invoke("memory-estimate", *arguments)


@pytest.fixture
def own_model(tmp_path: Path) -> str:
    file = tmp_path / "my_net.py"
    file.write_text(OWN_MODEL.replace("READS", ""))
    return f"{file}:net"


@pytest.fixture
def reading_model(tmp_path: Path) -> str:
    """One that looks at a value in its forward."""
    file = tmp_path / "reading_net.py"
    file.write_text(OWN_MODEL.replace("READS", "hidden = hidden * 2 if hidden.sum().item() > 0 else hidden"))
    return f"{file}:net"


KEYS = {
    *("device", "parameters_count", "trainable_parameters_count", "peak_allocated_bytes", "peak_reserved_bytes"),
    *("overhead_bytes", "peak_phase", "peak_module", "peak_op", "phase_peaks", "at_peak", "maximum"),
    *("capacity_bytes", "fits", "extrapolated_from_layers", "assumptions", "measured", "modules", "what_if"),
}
CATEGORIES = {
    f"{name}_bytes" for name in ("parameters", "gradients", "optimizer_state", "activations", "temporaries", "inputs")
}


class TestContract:
    """The keys of `--json`, and what holds between them."""

    @pytest.mark.parametrize("where", [("--device", "cpu"), ("--gpu", "h100")], ids=["cpu", "gpu"])
    def test_keys_and_sums(self, where: tuple[str, str]) -> None:
        done = estimate(*TINY, "--json", *where)
        assert done.code == 0, done.err
        result = done.result
        assert result.keys() >= KEYS
        assert result["at_peak"].keys() == CATEGORIES == result["maximum"].keys()
        assert sum(result["at_peak"].values()) == result["peak_allocated_bytes"]
        assert all(result["maximum"][key] >= result["at_peak"][key] for key in CATEGORIES)
        assert max(p["peak_allocated_bytes"] for p in result["phase_peaks"]) == result["peak_allocated_bytes"]
        assert result["peak_reserved_bytes"] >= result["peak_allocated_bytes"]
        assert {p["phase"] for p in result["phase_peaks"]} >= {"forward", "backward", "optimizer"}

    def test_modules_hold_all_the_parameters(self) -> None:
        result = estimate(*TINY, "--json", "--device", "cpu").result
        assert sum(m["parameters_bytes"] for m in result["modules"]) == 4 * result["parameters_count"]

    def test_a_deep_model_says_what_it_was_extended_from(self) -> None:
        result = estimate("gpt2", "training.micro_batch_size=1", "--json", "--gpu", "h100").result
        assert result["parameters_count"] == 124_439_808
        assert result["extrapolated_from_layers"] == [3, 4, 5]


class TestAnswers:
    def test_the_answer_comes_first_and_the_next_command_last(self) -> None:
        lines = estimate(*TINY, "--gpu", "h100").out.splitlines()
        assert lines[0].startswith(" ".join(TINY) + " on h100: fits, needs ")
        assert lines[-2] == "next:"
        assert lines[-1] == f"  bptool memory-estimate {' '.join(TINY)} --gpu h100 --what-if"

    def test_what_does_not_fit_is_a_no_and_settings_that_do_are_named(self) -> None:
        asked = ["tiny", "training.micro_batch_size=16", "--device", "cpu"]
        whole = estimate(*asked, "--json").result["peak_allocated_bytes"]
        done = estimate(*asked, "--json", "--fit", f"{whole * 2 // 3}")
        assert done.code == 1
        result = done.result
        assert result["fits"] is False
        assert result["fitting"]
        for one in result["fitting"]:
            again = estimate("tiny", "training.micro_batch_size=16", *one["settings"], "--device", "cpu", "--json")
            assert again.result["peak_allocated_bytes"] == one["peak_allocated_bytes"] <= whole * 2 // 3
        assert 1 <= result["largest_micro_batch_size"] < 16
        most = estimate(
            "tiny", f"training.micro_batch_size={result['largest_micro_batch_size']}", "--device", "cpu", "--json"
        )
        assert most.result["peak_allocated_bytes"] <= whole * 2 // 3

    def test_what_each_switch_saves_is_what_it_saves_when_asked_for(self) -> None:
        result = estimate(*TINY, "--what-if", "--json", "--device", "cpu").result
        peaks = {" ".join(one["settings"]): one["peak_allocated_bytes"] for one in result["what_if"]}
        assert list(peaks.values()) == sorted(peaks.values())
        key = "activation_checkpoint.policy=full"
        assert estimate(*TINY, key, "--json", "--device", "cpu").result["peak_allocated_bytes"] == peaks[key]

    def test_it_is_validated_by_a_real_step(self) -> None:
        measured = estimate(*TINY, "--validate", "--json", "--device", "cpu").result["measured"]
        assert measured["relative_error"] == 0

    def test_a_users_model(self, own_model: str) -> None:
        result = estimate(own_model, "--validate", "--json", "--device", "cpu").result
        assert result["parameters_count"] == 16 * 64 + 64 + 64 * 4 + 4
        assert result["measured"]["relative_error"] == 0
        assert {m["name"] for m in result["modules"]} >= {"first", "last"}

    def test_files(self, tmp_path: Path) -> None:
        page, snapshot = tmp_path / "page.html", tmp_path / "snapshot.pickle"
        done = estimate(*TINY, "--gpu", "h100", "--html", str(page), "--snapshot", str(snapshot), "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["command"] == "memory-estimate"
        assert page.read_text().startswith("<!DOCTYPE html>")
        compared = estimate(*TINY, "--gpu", "h100", "--snapshot-diff", str(snapshot), "--json").result
        assert compared["snapshot_diff"]["differences"] == []
        refused = estimate(*TINY, "--gpu", "h100", "--html", str(page))
        assert (refused.code, "--force" in refused.err) == (2, True)
        assert estimate(*TINY, "--gpu", "h100", "--html", str(page), "--force").code == 0


class TestExplain:
    """`--explain` beside closed forms that are worked out here, from the shapes alone."""

    B, S, H, A, V, LAYERS = 2, 64, 64, 4, 256, 2
    GPT = (
        *("tiny", "model.norm=layernorm", "model.position=learned", "model.activation=gelu", "model.bias=true"),
        *(f"model.n_layers={LAYERS}", f"model.d_model={H}", f"model.n_heads={A}", f"model.d_ff={4 * H}"),
        *(f"model.vocab_size={V}", f"model.context_length={S}", "model.attention=eager", "model.dropout=0.1"),
        *(f"training.micro_batch_size={B}", "precision.mode=bf16", "optimizer.implementation=loop"),
        *("--gpu", "h100", "--explain"),
    )

    def test_a_gpt_layer(self) -> None:
        """Korthikanti et al. 2022, eq. 2; here softmax is float32, and there are a mask and two norms' statistics."""
        b, s, h, a = self.B, self.S, self.H, self.A
        explained = estimate(*self.GPT, "--json").result["explanation"]
        (layer,) = explained["literature"]
        assert layer["predicted_bytes"] == s * b * h * 34 + 5 * a * s * s * b == s * b * h * (34 + 5 * a * s // h)
        departures = 2 * a * s * s * b + s * s + 2 * 2 * 4 * b * s
        assert layer["difference_bytes"] == departures
        terms = {term["name"]: term for term in explained["terms"]}
        of_one = layer["predicted_bytes"] + departures
        assert terms["activations of blocks.0"]["predicted_bytes"] == of_one
        assert terms["activations of all blocks"]["predicted_bytes"] == self.LAYERS * of_one

    def test_states(self) -> None:
        """Each weight matrix and bias by hand: 2, 2 and 4 bytes a parameter, rounded to 512 for each tensor."""
        h = self.H
        layer = 4 * (h * h + h) + (h * 4 * h + 4 * h) + (4 * h * h + h) + 2 * 2 * h
        count = self.V * h + self.S * h + self.LAYERS * layer + 2 * h
        done = estimate(*self.GPT, "--json")
        terms = {term["name"]: term for term in done.result["explanation"]["terms"]}
        assert done.result["parameters_count"] == count
        assert terms["weights"]["predicted_bytes"] == 2 * count
        assert terms["gradients"]["predicted_bytes"] == 2 * count
        assert terms["optimizer state"]["predicted_bytes"] == 4 * count
        assert terms["logits at their most"]["formula"]
        per_parameter = {
            row["name"]: row["per_parameter_bytes"] for row in done.result["explanation"]["bytes_per_parameter"]
        }
        assert per_parameter == {"weights": 2, "gradients": 2, "optimizer state": 4}

    def test_what_is_said(self) -> None:
        text = estimate(*self.GPT).out
        assert "a GPT layer in the literature, and one of this model" in text
        assert "softmax is taken in float32" in text
        assert "a CPU keeps" not in text
        assert "8 of 8 closed forms agree with the ledger to the byte, but for the allocator's rounding" in text

    def test_a_users_model_has_states_alone(self, own_model: str) -> None:
        explained = estimate(own_model, "--explain", "--json", "--gpu", "h100").result["explanation"]
        count = 16 * 64 + 64 + 64 * 4 + 4
        assert {term["name"]: term["predicted_bytes"] for term in explained["terms"]} == {
            "weights": 4 * count,
            "gradients": 4 * count,
            "optimizer state": 8 * count + 4 * 4,  # fused AdamW's counters are on the GPU
        }
        assert explained["no_closed_form"] == [f"the activations of {own_model}"]


class TestMistakes:
    def told(self, done: Done, code: int, *words: str) -> None:
        assert (done.code, done.out) == (code, "")
        missing = [word for word in words if word not in done.err]
        assert not missing, done.err

    def test_an_unknown_gpu(self) -> None:
        self.told(estimate("tiny", "--gpu", "h10"), 2, "h10", "'h100'")

    def test_an_unknown_device(self) -> None:
        self.told(estimate("tiny", "--device", "tpu"), 2, "tpu", "cuda", "--gpu")

    def test_a_cpu_that_is_a_gpu(self) -> None:
        self.told(estimate("tiny", "--device", "cpu", "--gpu", "h100"), 2, "exclude each other")

    def test_no_quantity(self) -> None:
        self.told(estimate("tiny", "--fit", "much"), 2, "'much'", "24GiB")

    def test_an_unknown_family(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
        self.told(estimate(str(tmp_path)), 2, "mamba", "llama", "deepseek_v3")

    def test_a_real_step_needs_the_machine(self) -> None:
        self.told(estimate(*TINY, "--gpu", "h100", "--validate"), 3, "no GPU", "--device cpu")

    def test_a_model_that_reads_values_names_the_line_and_runs_in_earnest(self, reading_model: str) -> None:
        file, _, _ = reading_model.partition(":")
        self.told(estimate(reading_model, "--device", "cpu"), 2, file, "line 12", "--validate")
        done = estimate(reading_model, "--device", "cpu", "--validate", "--json")
        assert done.code == 0, done.err
        assert done.result["measured"]["relative_error"] == 0

    @pytest.mark.parametrize("gpu", ["a100", "v100"])
    def test_a_gpu_of_several_sizes(self, gpu: str) -> None:
        sizes = {"a100": "a100-40gb or a100-80gb?", "v100": "v100-16gb or v100-32gb?"}
        self.told(estimate("tiny", "--gpu", gpu), 2, f"'{gpu}'", sizes[gpu])

    def test_nothing_fits_into_nothing(self) -> None:
        self.told(estimate("tiny", "--fit", "0GiB"), 2, "'0GiB'", "24GiB")

    def test_a_mode_that_this_device_does_not_have(self) -> None:
        done = estimate(*TINY, "precision.mode=tf32", "--device", "cpu", "--validate")
        self.told(done, 3, "'tf32' needs a CUDA device", "precision.mode=fp32")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "it is empty (0 bytes)"),
            (pickle.dumps({"segments": [{"device": 0}] * 9, "device_traces": []})[:60], "truncated"),
            (pickle.dumps(print), "builtins.print, which could run code"),
            (pickle.dumps({"a": 1}), "has no 'segments'"),
            (b"\x80\x04\x8e" + (2**45).to_bytes(8, "little") + b"x.", "MemoryError"),
            (pickle.dumps({"segments": [], "device_traces": []}), "nothing was on a GPU"),
        ],
        ids=["empty", "cut short", "malicious", "foreign", "of a false length", "of nothing"],
    )
    def test_snapshots_that_are_none(self, content: bytes, words: str, tmp_path: Path) -> None:
        file = tmp_path / "x.pickle"
        file.write_bytes(content)
        self.told(estimate("tiny", "--gpu", "h100", "--snapshot-diff", str(file)), 2, str(file), words)

    def test_a_snapshot_beside_a_cpu(self, tmp_path: Path) -> None:
        done = estimate("tiny", "--device", "cpu", "--snapshot-diff", str(tmp_path / "x.pickle"))
        self.told(done, 2, "of a GPU's memory", "--gpu NAME")

    @pytest.mark.parametrize("option", ["--html", "--snapshot"])
    def test_files_that_cannot_be_written_are_refused_at_once(self, option: str, tmp_path: Path) -> None:
        self.told(estimate("tiny", option, str(tmp_path)), 2, f"{option} {tmp_path} is a folder", "name a file in it")
        missing = tmp_path / "no" / "x.html"
        self.told(estimate("tiny", option, str(missing)), 2, f"there is no folder {missing.parent}", "mkdir -p")
        self.told(estimate("tiny", option, str(tmp_path), "--force"), 2, "is a folder")

    def test_one_file_for_two(self, tmp_path: Path) -> None:
        file = str(tmp_path / "x")
        self.told(estimate("tiny", "--html", file, "--snapshot", file), 2, "--html and --snapshot", "the same file")

    @pytest.mark.parametrize("option", ["--html", "--snapshot"])
    def test_a_full_disk_leaves_the_old_file(
        self, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        (tmp_path / "x").write_text("old")
        monkeypatch.setattr("os.fsync", refuse)
        done = estimate(*TINY, "--device", "cpu", option, str(tmp_path / "x"), "--force")
        self.told(done, 3, "x could not be written: No space left on device", "make room")
        assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("x", "old")]

    def test_a_users_file_that_raises(self, tmp_path: Path) -> None:
        file = tmp_path / "broken.py"
        file.write_text("def net():\n    raise ValueError('no such layer')\n")
        self.told(estimate(f"{file}:net"), 2, "no such layer", "line 2")

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"READS": "raise ValueError('no such head')"}, ["raised ValueError: no such head", "line 12, in forward"]),
            ({"READS": "x.numpy()"}, ["does not run on fake tensors", "line 12, in forward", "add --validate"]),
            ({"READS": "x[hidden.sum(1) > 0]"}, ["does not run on fake tensors", "line 12, in forward"]),
            ({"READS": "self.last(x)"}, ["raised RuntimeError", "[8, 16] X [64, 4]", "line 12, in forward"]),
            ({"model=Net": "model=Net()"}, ["its model is Net, not a function", "model=lambda: Net(...)"]),
            ({"model=Net": "model=lambda: 3"}, ["its model() gave int, not a torch.nn.Module"]),
            ({"model=Net": "model=nn.Identity"}, ["no parameter requires a gradient"]),
            ({"torch.randn(8": "1 / 0 * torch.randn(8"}, ["raised ZeroDivisionError", "line 18"]),
            ({'batch["y"])': "batch[\"y\"], reduction='none')"}, ["its loss is of shape [8], not a scalar"]),
            ({'batch["y"])': 'batch["label"])'}, ["raised KeyError: 'label'", "line 19, in <lambda>"]),
        ],
        ids=["raises", "numpy", "shape", "mismatch", "instance", "number", "no parameters", "batch", "vector", "key"],
    )
    def test_a_users_model_that_fails(self, changed: dict[str, str], words: list[str], tmp_path: Path) -> None:
        """With the place where it is theirs; what happens without values alone is told from what always happens."""
        text = OWN_MODEL
        for old, new in changed.items():
            text = text.replace(old, new)
        file = tmp_path / "failing_net.py"
        file.write_text(text.replace("READS", ""))
        done = estimate(f"{file}:net", "--device", "cpu")
        self.told(done, 2, *words)
        assert ("fake tensors" in done.err) == any("fake tensors" in word for word in words)

    def test_an_error_of_a_real_step_is_the_users_too(self, tmp_path: Path) -> None:
        file = tmp_path / "failing_net.py"
        file.write_text(OWN_MODEL.replace("READS", "raise ValueError('no such head')"))
        done = estimate(f"{file}:net", "--device", "cpu", "--validate")
        self.told(done, 2, "raised ValueError: no such head", "line 12, in forward", "fix it there, then run again")
        assert "--validate" not in done.err


def test_a_configs_missing_keys_are_told(tmp_path: Path) -> None:
    """The family's defaults in their place stand among the assumptions, but for those that are typed."""
    config = {"model_type": "mistral", "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    config |= {"num_attention_heads": 8, "vocab_size": 99, "max_position_embeddings": 32, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = estimate(str(tmp_path), "model.norm_eps=1e-5", "--json").result
    told = next(sentence for sentence in found["assumptions"] if "leaves out keys" in sentence)
    assert "num_key_value_heads = 8" in told
    assert "rms_norm_eps" not in told
    assert "num_key_value_heads = 8" in estimate(str(tmp_path)).out
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused = estimate(str(tmp_path))
    assert (refused.code, "hidden_size is missing" in refused.err) == (2, True)
