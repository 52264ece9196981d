"""The settings of a run: what each key means, its type and its range.

A `Config` is frozen, validated and complete: `"auto"` is replaced by a number while it is validated, so no reader has
to know the rule again. The defaults are those of the preset `tiny` (a test holds the two together). The text below each
field is its documentation; presets and `--help` quote it.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

AUTO: Any = "auto"  # Any: it stands in for an int until the section's validator has replaced it
PYTHON_STDLIB = "python-stdlib"
BYTES, BPE = "bytes", "bpe"

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConflictError(ValueError):
    """Settings that are right one by one and wrong together (or a rule that no range can state).

    Args:
        message: what is wrong; it names the keys in full, with what they are.
        keys: the dotted keys that it depends on, defaults included, the likeliest culprit first. Where one of
            them has a mistake of its own, the conflict says nothing new.
    """

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


class Section(BaseModel):
    """One table of a config: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


class RunSettings(Section):
    """`[run]`: the run's name, place and seed."""

    name: str = ""
    """The run's folder below `directory`; empty: named after the target, with a number where that is taken."""
    directory: str = "runs"
    """The folder that holds the runs' folders."""
    seed: NonNegative = 1337
    """Initial weights, data order, dropout and samples are functions of it."""
    workload: str = ""
    """`file.py:name` of the user's own model, as the TARGET named it; empty: the built-in transformer."""

    @model_validator(mode="after")
    def _name_is_one_folder(self) -> Self:
        one_folder = PurePath(self.name).name == self.name and self.name.isprintable()
        if self.name and (not one_folder or self.name.startswith(".")):
            raise ConflictError(
                f"run.name = {self.name!r} must be the name of one folder, without '/' or a leading '.'",
                "run.name",
            )
        return self


class RopeSettings(Section):
    """`[model.rope]`: rotary position embeddings, read only where `model.position = "rope"`."""

    theta: PositiveFloat = 10000.0
    """Base of the geometric series of wavelengths."""
    scaling: Literal["none", "llama3"] = "none"
    """`llama3` stretches the long wavelengths as Llama 3.1 does, by the four keys below."""
    factor: PositiveFloat = 8.0
    """llama3: how much the longest wavelengths are stretched."""
    low_frequency_factor: PositiveFloat = 1.0
    """llama3: wavelengths longer than `original_context_length` / this are stretched in full."""
    high_frequency_factor: PositiveFloat = 4.0
    """llama3: wavelengths shorter than `original_context_length` / this are left alone."""
    original_context_length: Positive = 8192
    """llama3: the context length before stretching, in tokens."""

    @model_validator(mode="after")
    def _band_is_ordered(self) -> Self:
        if self.scaling == "llama3" and self.high_frequency_factor <= self.low_frequency_factor:
            raise ConflictError(
                f"model.rope.high_frequency_factor = {self.high_frequency_factor} must exceed"
                f" model.rope.low_frequency_factor = {self.low_frequency_factor}",
                *(f"model.rope.{key}" for key in ("high_frequency_factor", "low_frequency_factor", "scaling")),
            )
        return self


class ModelSettings(Section):
    """`[model]`: a decoder-only transformer, GPT-2 at one end and Llama at the other."""

    n_layers: Positive = 4
    """Number of transformer blocks."""
    d_model: Positive = 128
    """Width of the residual stream."""
    n_heads: Positive = 4
    """Number of query heads."""
    n_kv_heads: Positive = AUTO
    """Number of key and value heads; `auto`: as many as query heads. Fewer is grouped-query attention."""
    head_dim: Positive = AUTO
    """Width of one head; `auto`: d_model / n_heads."""
    d_ff: Positive = AUTO
    """Inner width of the feed-forward; `auto`: 4 d_model, or 8/3 d_model rounded up to 64 for swiglu."""
    vocab_size: Positive = 256
    """Number of token ids, as the embedding has rows."""
    context_length: Positive = 256
    """Most tokens that the model sees at once."""
    norm: Literal["layernorm", "rmsnorm", "none"] = "rmsnorm"
    """Normalisation before each branch and at the end."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance before its square root."""
    position: Literal["learned", "rope", "none"] = "rope"
    """How tokens know their place: a learned table, rotation of queries and keys, or not at all."""
    rope: RopeSettings = RopeSettings()
    """Rotary embeddings."""
    activation: Literal["gelu", "gelu-tanh", "relu", "swiglu"] = "swiglu"
    """Non-linearity of the feed-forward; `gelu` is the exact one, `swiglu` is gated."""
    bias: bool = False
    """Biases in linear layers and in LayerNorm."""
    qk_norm: bool = False
    """RMS-normalise each head's queries and keys (with a learned scale) before the rotation."""
    tied_embeddings: bool = True
    """The output projection uses the token embedding's weights."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout after the embedding, on attention weights and on each branch's output, while training."""
    residual: bool = True
    """Add each branch to its input; off replaces instead of adding, to show what the addition does."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """`sdpa` is PyTorch's fused attention; `eager` is written out and holds all the attention weights."""
    weights: str = ""
    """A folder with Hugging Face weights (safetensors) to begin from; empty: random weights."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; branch outputs get it divided by sqrt(2 n_layers), as GPT-2's."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_auto(cls, values: Any) -> Any:
        """Replace `auto` by its number wherever the numbers that it needs are there and make sense."""
        if not isinstance(values, dict):
            return values

        def given(key: str) -> Any:
            value = values.get(key, cls.model_fields[key].default)
            return value if type(value) is int and value > 0 else None

        resolved = dict(values)
        d_model, n_heads = given("d_model"), given("n_heads")
        if values.get("n_kv_heads", AUTO) == AUTO and n_heads:
            resolved["n_kv_heads"] = n_heads
        if values.get("head_dim", AUTO) == AUTO and d_model and n_heads:
            if d_model % n_heads:
                raise ConflictError(
                    f"model.d_model = {d_model} is not divisible by model.n_heads = {n_heads}; "
                    "choose a divisor, or set model.head_dim yourself",
                    *("model.d_model", "model.n_heads", "model.head_dim"),
                )
            resolved["head_dim"] = d_model // n_heads
        if values.get("d_ff", AUTO) == AUTO and d_model:
            gated = values.get("activation", cls.model_fields["activation"].default) == "swiglu"
            resolved["d_ff"] = -(-8 * d_model // 3 // 64) * 64 if gated else 4 * d_model
        return resolved

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ConflictError(
                f"model.n_heads = {self.n_heads} is not divisible by model.n_kv_heads = {self.n_kv_heads}",
                *("model.n_kv_heads", "model.n_heads"),
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ConflictError(
                f"model.head_dim = {self.head_dim} is odd; rope rotates pairs, so it must be even",
                *("model.head_dim", "model.d_model", "model.n_heads", "model.position"),
            )
        return self


class DataSettings(Section):
    """`[data]`: the text, and how it becomes token ids."""

    source: str = PYTHON_STDLIB
    """`python-stdlib` (the standard library's own source), a text file, a folder of text, or a token file (.bin)."""
    tokenizer: str = BYTES
    """`bytes`, `bpe` (trained on the source to `model.vocab_size`), or a tokenizer.json; unused for a token file."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the tokens that is held out: evaluated on, never trained on."""


class TrainingSettings(Section):
    """`[training]`: the step and its batch."""

    steps: Positive = 1000
    """Optimizer steps of the whole run."""
    micro_batch_size: Positive = 8
    """Sequences in one forward and backward."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches whose gradients are summed before one update."""
    sequence_length: Positive = AUTO
    """Tokens in a sequence; `auto`: the model's context length."""
    clip_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down to it; 0: never."""
    loss: Literal["fused", "plain"] = "fused"
    """`fused` takes the last projection and the cross-entropy in slices, so all the logits never exist at once."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1` ...; `auto`: a GPU where there is one."""
    compile: bool = False
    """Compile each block with torch.compile."""


class OptimizerSettings(Section):
    """`[optimizer]`: the update rule."""

    name: Literal["gradient-descent", "sgd", "adam", "adamw", "muon", "adafactor"] = "adamw"
    """`gradient-descent` is theta - lr * grad and nothing else; `sgd` has momentum; `muon` is for hidden matrices, and
    leaves the rest to AdamW."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices; vectors (norms, biases) are never decayed. Unused by gradient-descent."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """adam, adamw (and muon's AdamW): decay of the mean of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """adam, adamw (and muon's AdamW): decay of the mean of squared gradients."""
    eps: PositiveFloat = 1e-8
    """adam, adamw (and muon's AdamW): added to the root of the second moment."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """sgd, muon: decay of the momentum."""
    nesterov: bool = True
    """sgd, muon: look ahead along the momentum."""
    implementation: Literal["auto", "fused", "foreach", "loop"] = "auto"
    """One kernel for all parameters, one list operation a stage, or a loop; `auto`: the fastest there is here."""


class ScheduleSettings(Section):
    """`[schedule]`: the learning rate over the run."""

    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape after the warm-up; `wsd` is warmup-stable-decay: constant, then linear over the last `decay_fraction`."""
    warmup_steps: NonNegative = 40
    """Steps of linear rise from lr / warmup_steps to lr."""
    final_lr_fraction: Fraction = 0.1
    """Learning rate of the last step, as a fraction of the peak (linear, cosine, wsd)."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: share of the run's steps, at its end, over which the learning rate falls."""


class PrecisionSettings(Section):
    """`[precision]`: the number formats of weights and arithmetic."""

    mode: Literal["fp32", "tf32", "bf16-mixed", "bf16", "fp16-mixed"] = "fp32"
    """`-mixed`: fp32 weights, cast per operation (autocast; fp16 with loss scaling); `bf16`: bf16 throughout."""


class ActivationCheckpointSettings(Section):
    """`[activation_checkpoint]`: what the forward keeps, and what the backward computes again."""

    policy: Literal["none", "full", "every_k"] = "none"
    """`full` recomputes every block in the backward, `every_k` each `every`-th one."""
    every: Positive = 2
    """every_k: blocks 0, every, 2 every ... are recomputed."""


class CheckpointSettings(Section):
    """`[checkpoint]`: what resume reads."""

    every: NonNegative = 200
    """Steps between checkpoints; 0: only at the end and when interrupted."""
    keep: Positive = 2
    """How many of the newest valid checkpoints stay."""


class EvaluationSettings(Section):
    """`[evaluation]`: the held-out loss, and text sampled from the model."""

    every: NonNegative = 200
    """Steps between evaluations; 0: only at the end."""
    sequences: Positive = 64
    """Held-out sequences in one evaluation, evenly spaced; fewer where the split has fewer."""
    sample_every: NonNegative = 500
    """Steps between samples; 0: only at the end."""
    sample_tokens: NonNegative = 300
    """Tokens in a sample; 0: none at all."""
    prompt: str = "def "
    """What a sample continues."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: NonNegative = 50
    """Sample among the k likeliest tokens; 0: among all."""


class LoggingSettings(Section):
    """`[logging]`: what is written while the run goes on."""

    every: Positive = 1
    """Steps between lines of metrics.jsonl and points in TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
    gradient_histograms_every: NonNegative = 0
    """Steps between histograms of each parameter's gradient in TensorBoard; 0: none."""


class GradientSettings(Section):
    """`[gradients]`: what to do about bad ones."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss or gradient: stop the run before the update, or skip that update and go on."""


class Config(Section):
    """All the settings of one run."""

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings(sequence_length=ModelSettings().context_length)
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    precision: PrecisionSettings = PrecisionSettings()
    activation_checkpoint: ActivationCheckpointSettings = ActivationCheckpointSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    logging: LoggingSettings = LoggingSettings()
    gradients: GradientSettings = GradientSettings()

    @model_validator(mode="before")
    @classmethod
    def _resolve_sequence_length(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        model, training = values.get("model", {}), values.get("training", {})
        if isinstance(model, ModelSettings):
            model = model.model_dump()
        if not (isinstance(model, dict) and isinstance(training, dict)):
            return values
        context_length = model.get("context_length", ModelSettings.model_fields["context_length"].default)
        known = type(context_length) is int and context_length > 0
        if known and training.get("sequence_length", AUTO) == AUTO:
            return {**values, "training": {**training, "sequence_length": context_length}}
        return values

    @model_validator(mode="after")
    def _sequence_fits_context(self) -> Self:
        if self.training.sequence_length > self.model.context_length:
            raise ConflictError(
                f"training.sequence_length = {self.training.sequence_length} exceeds"
                f" model.context_length = {self.model.context_length}",
                *("training.sequence_length", "model.context_length"),
            )
        return self
