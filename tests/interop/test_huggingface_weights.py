"""Weights through Hugging Face's format, held to what `transformers` computes with them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bptool.config.huggingface import model_settings_from_huggingface
from bptool.config.schema import ModelSettings, RopeSettings
from bptool.errors import StorageError, UsageError
from bptool.interop.huggingface import load_weights, save_weights
from bptool.interop.huggingface_names import parameter_shapes
from bptool.model.transformer import Transformer, build

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

GPT2 = {"n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 40, "vocab_size": 53, "initializer_range": 0.3}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 400,
    "vocab_size": 53,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def gpt2(**keys: Any) -> Any:
    torch.manual_seed(0)
    return unlike_fresh(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **NO_DROPOUT, **keys})))


def llama(**keys: Any) -> Any:
    torch.manual_seed(0)
    return unlike_fresh(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **keys})))


def unlike_fresh(model: Any) -> Any:
    """Norms and biases away from 1 and 0, where a mistake would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 5)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "gpt2-untied-relu": lambda: gpt2(tie_word_embeddings=False, activation_function="relu", n_inner=31),
    "gpt2-gelu": lambda: gpt2(activation_function="gelu", layer_norm_epsilon=0.1),
    "llama": llama,
    "llama-tied-biased": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama3": lambda: llama(rope_theta=5000.0, rope_scaling=LLAMA3_ROPE, head_dim=6, num_key_value_heads=3),
}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(53, (3, 40), generator=torch.Generator().manual_seed(1))


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    settings = model_settings_from_huggingface(json.loads((folder / "config.json").read_text()), "config.json")
    model = build(settings, device="cpu", seed=0, dtype=dtype)
    model.load_state_dict(load_weights(folder, settings))
    return model


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@each_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_transformers(name: str, attention: str, ids: Tensor, tmp_path: Path) -> None:
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path)
    mine = ours(tmp_path)
    same = build(mine.settings.model_copy(update={"attention": attention}), device="cpu", seed=0)
    same.load_state_dict(mine.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(same(ids), model(ids).logits, rtol=1e-5, atol=1e-5)


def in_float64(model: Any) -> Any:
    """Transformers' RMSNorm rounds to float32 whatever it is given; torch's own, with the same weights, does not."""
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                exact = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                exact.weight = child.weight
                setattr(parent, child_name, exact)
    return model.double()


@each_model
def test_logits_and_gradients_in_float64(name: str, ids: Tensor, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    mine, model = ours(tmp_path, torch.float64), in_float64(model)
    torch.testing.assert_close(mine(ids), model(ids).logits, rtol=1e-10, atol=1e-10)
    mine(ids[:, :-1], ids[:, 1:], loss="fused").backward()
    nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    # The gradients go through the weights' own mapping: saved as if they were weights, and loaded by ours.
    folder = tmp_path / "gradients"
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder)
    wanted = load_weights(folder, mine.settings)
    for parameter_name, parameter in mine.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted[parameter_name], rtol=1e-9, atol=1e-10)


@each_model
def test_transformers_loads_what_we_save(name: str, ids: Tensor, tmp_path: Path) -> None:
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path / "theirs")
    mine = ours(tmp_path / "theirs")
    save_weights(mine.state_dict(), mine.settings, tmp_path / "new" / "ours")
    back = theirs(tmp_path / "new" / "ours").eval()
    assert type(back) is type(model)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)
    again = ours(tmp_path / "new" / "ours")
    assert again.settings == mine.settings
    assert all(torch.equal(again.state_dict()[key], value) for key, value in mine.state_dict().items())


def test_a_bfloat16_model_stays_one(tmp_path: Path) -> None:
    settings = ModelSettings(n_layers=1, d_model=16, n_heads=2, vocab_size=11)
    model = build(settings, device="cpu", seed=0, dtype=torch.bfloat16)
    save_weights(model.state_dict(), settings, tmp_path)
    assert theirs(tmp_path).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in load_weights(tmp_path, settings).values()} == {torch.bfloat16}


def test_shards_and_files_of_the_bare_model(ids: Tensor, tmp_path: Path) -> None:
    for name in ("gpt2", "llama"):
        model = MODELS[name]()
        model.save_pretrained(tmp_path / name)
        whole = ours(tmp_path / name)
        model.save_pretrained(tmp_path / f"{name}-shards", max_shard_size="10KB")
        assert len(list((tmp_path / f"{name}-shards").glob("*.safetensors"))) > 2
        bare = tmp_path / f"{name}-bare"
        getattr(model, model.base_model_prefix).save_pretrained(bare)
        if name == "llama":  # the bare model has no head of its own
            save_file(
                {**load_file(bare / "model.safetensors"), "lm_head.weight": model.lm_head.weight.detach()},
                bare / "model.safetensors",
            )
        for folder in (tmp_path / f"{name}-shards", bare):
            found = load_weights(folder, whole.settings)
            assert all(torch.equal(found[key], value) for key, value in whole.state_dict().items())


def test_what_is_no_parameter_is_passed_over(tmp_path: Path) -> None:
    """Old files hold GPT-2's causal mask and Llama's frequencies."""
    for name, extra in (
        ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 40, 40), "h.1.attn.masked_bias": ()}),
        ("llama-tied-biased", {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}),
    ):
        MODELS[name]().save_pretrained(tmp_path / name)
        settings = ours(tmp_path / name).settings
        file = tmp_path / name / "model.safetensors"
        save_file({**load_file(file), **{key: torch.zeros(shape) for key, shape in extra.items()}}, file)
        assert load_weights(tmp_path / name, settings).keys() == parameter_shapes(settings).keys()


def test_a_tied_head_is_passed_over_if_it_is_the_embedding(tmp_path: Path) -> None:
    MODELS["llama-tied-biased"]().save_pretrained(tmp_path)
    settings, file = ours(tmp_path).settings, tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert load_weights(tmp_path, settings).keys() == parameter_shapes(settings).keys()
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    assert "a head that is not the embedding" in refusal(tmp_path, settings).message


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "rmsnorm-offset", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_are_those_of_the_model(norm: str, bias: bool) -> None:
    for activation, position, tied, router in (
        ("relu", "learned", True, "softmax"),
        ("geglu-tanh", "rope", False, "sigmoid"),
    ):
        settings = ModelSettings.model_validate({
            "n_layers": 2, "d_model": 24, "n_heads": 6, "n_kv_heads": 2, "head_dim": 6, "d_ff": 10, "vocab_size": 7,
            "norm": norm, "bias": bias, "activation": activation, "position": position, "tied_embeddings": tied,
            "qk_norm": tied, "post_norm": tied, "qkv_bias": tied,
            "moe": {"n_experts": 0 if bias else 4, "n_dense_layers": 1, "n_shared": 2 * tied, "router": router},
        })  # fmt: skip
        state = build(settings, device="meta", seed=0).state_dict()
        assert parameter_shapes(settings) == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.fixture
def llama_folder(tmp_path: Path) -> tuple[Path, ModelSettings]:
    MODELS["llama"]().save_pretrained(tmp_path)
    return tmp_path, ours(tmp_path).settings


def refusal(folder: Path, settings: ModelSettings) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_weights(folder, settings)
    return caught.value


def test_weights_of_another_model_are_refused(llama_folder: tuple[Path, ModelSettings]) -> None:
    folder, settings = llama_folder
    more = refusal(folder, settings.model_copy(update={"n_layers": 4}))
    assert "missing: model.layers.2.input_layernorm.weight, " in more.message
    assert "and 13 more" in more.message
    assert "config.json" in more.remedy
    fewer = refusal(folder, settings.model_copy(update={"n_layers": 1})).message
    assert "not of this model: " in fewer
    assert "missing" not in fewer
    wider = refusal(folder, settings.model_copy(update={"vocab_size": 60})).message
    assert "model.embed_tokens.weight is [53, 24] and not [60, 24]" in wider
    ungrouped = refusal(folder, settings.model_copy(update={"n_kv_heads": 6})).message
    assert "model.layers.0.self_attn.k_proj.weight is [8, 24] and not [24, 24]" in ungrouped


def test_settings_that_no_family_has_are_refused(llama_folder: tuple[Path, ModelSettings]) -> None:
    folder, settings = llama_folder
    assert "residual = False" in refusal(folder, settings.model_copy(update={"residual": False})).message


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    error = refusal(tmp_path, ModelSettings())
    assert "pytorch_model.bin: a pickle, which can run code" in error.message
    assert "save_pretrained" in error.remedy


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    assert "there is no such folder" in refusal(tmp_path / "nowhere", ModelSettings()).message
    assert "model.safetensors" in refusal(tmp_path, ModelSettings()).message


def test_broken_files_are_refused(llama_folder: tuple[Path, ModelSettings]) -> None:
    folder, settings = llama_folder
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken in (b"", b"hello", whole[:100], whole[:-10]):
        file.write_bytes(broken)
        assert "not a safetensors file, or is cut short" in refusal(folder, settings).message


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("[]", "needs a 'weight_map'"),
        ("{", "needs a 'weight_map'"),
        ('{"weight_map": {"a": 3}}', "needs a 'weight_map'"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "not beside it: outside.safetensors"),
    ],
)
def test_a_broken_index_is_refused(index: str, words: str, tmp_path: Path) -> None:
    save_file({}, tmp_path / "outside.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    assert words in refusal(tmp_path / "model", ModelSettings()).message


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    settings = ModelSettings(n_layers=1, d_model=16, n_heads=2, vocab_size=11)
    state = build(settings, device="cpu", seed=0).state_dict()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file could not be written"):
        save_weights(state, settings, tmp_path / "file")
    (tmp_path / "folder" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"model\.safetensors could not be written"):
        save_weights(state, settings, tmp_path / "folder")
    assert not (tmp_path / "folder" / "config.json").exists()


def test_a_model_that_no_family_has_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="residual"):
        save_weights({}, ModelSettings(residual=False, rope=RopeSettings(theta=1.0)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
