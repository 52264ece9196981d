"""The settings of a run: what each key means, its type and its range.

A `Config` is frozen, validated and complete: `"auto"` is replaced by a number while it is validated, so no reader has
to know the rule again. The defaults are those of the preset `tiny` (a test holds the two together). The text below each
field is its documentation; presets and `--help` quote it.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bptool.config.block_plan import not_alike, parse_plan
from bptool.config.model_schema import MlaSettings, ModelSettings, MoeSettings, RopeSettings
from bptool.config.section import (
    AUTO,
    ConflictError,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)
from bptool.units import parse_bytes

__all__ = ["AUTO", "Config", "ConflictError", "MlaSettings", "ModelSettings", "MoeSettings", "RopeSettings", "Section"]

PYTHON_STDLIB = "python-stdlib"
BYTES, BPE = "bytes", "bpe"

Bf16Update = Literal["nearest", "stochastic", "master"]


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
    """Compile each block, with what it computes again, or a model that has none as a whole, by torch.compile."""


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
    bf16_update: Bf16Update = "nearest"
    """bf16: how an update gets into the weights. `nearest`: rounded, so one of less than half a bf16 step is lost;
    `stochastic`: made in fp32 and rounded up or down at random, right on average; `master`: the optimizer owns fp32
    weights and state, and bf16 weights are rounded from them."""

    @model_validator(mode="after")
    def _only_bf16_is_rounded(self) -> Self:
        if self.bf16_update != "nearest" and self.mode != "bf16":
            raise ConflictError(
                f"precision.bf16_update = '{self.bf16_update}' is for weights of bf16, and precision.mode ="
                f" '{self.mode}' has them in fp32",
                *("precision.bf16_update", "precision.mode"),
            )
        return self


class ActivationCheckpointSettings(Section):
    """`[activation_checkpoint]`: what the forward keeps, and what the backward computes again."""

    policy: Literal[
        "none",
        "full",
        "every_k",
        "attention",
        "mlp",
        "save_matmuls",
        "save_every_other_matmul",
        "save_attention",
        "offload",
        "budget",
        "plan",
    ] = "none"
    """Recomputed in the backward: `full` every block, `every_k` each `every`-th one, `attention` or `mlp` that sublayer
    of each block; `save_matmuls` all but matrix products and fused attention, `save_every_other_matmul` every second
    product too, `save_attention` all but fused attention. `offload` recomputes nothing: what blocks save waits in host
    memory (on a CPU it is there already). `budget`: the least recomputation that fits `budget`. `plan`: block by block,
    as `plan` has it."""
    every: Positive = 2
    """every_k: blocks 0, every, 2 every ... are recomputed."""
    budget: str = ""
    """budget: all that a micro-batch's forward may hold for its backward when it ends, the loss's part too: `4GiB`."""
    plan: str = ""
    """plan: each block's policy, from the first block on, such as `20*full+4*save_matmuls+2*none`; a block that keeps
    the results of single operations lists them, `save:attention-1.mm-1-2`."""

    @model_validator(mode="after")
    def _budget_is_one(self) -> Self:
        key = "activation_checkpoint.budget"
        if self.budget:
            try:
                parse_bytes(self.budget)
            except ValueError as error:
                raise ConflictError(f"{key}: {error}; write 4GiB (2^30 bytes each) or 4GB (10^9)", key) from None
        elif self.policy == "budget":
            keys = ("activation_checkpoint.policy", key)
            raise ConflictError(f"activation_checkpoint.policy = 'budget' needs {key}, such as 4GiB", *keys)
        return self

    @model_validator(mode="after")
    def _plan_is_one(self) -> Self:
        key = "activation_checkpoint.plan"
        if self.plan:
            try:
                parse_plan(self.plan)
            except ValueError as error:
                raise ConflictError(f"{key} = {self.plan!r}: {error}", key) from None
        elif self.policy == "plan":
            example = "such as 20*full+6*none"
            raise ConflictError(
                f"activation_checkpoint.policy = 'plan' needs {key}, {example}", "activation_checkpoint.policy", key
            )
        return self


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

    @model_validator(mode="after")
    def _compiled_blocks_save_products(self) -> Self:
        settings = self.activation_checkpoint
        others = not_alike(settings.plan) if settings.policy == "plan" and self.training.compile else []
        if others:
            raise ConflictError(
                f"activation_checkpoint.plan saves {', '.join(others)}, which with training.compile = true may be the"
                " result of another operation; a compiled block saves products (mm, addmm, bmm ...) and attention",
                *("activation_checkpoint.plan", "training.compile"),
            )
        return self

    @model_validator(mode="after")
    def _plan_is_of_these_blocks(self) -> Self:
        settings, n_layers = self.activation_checkpoint, self.model.n_layers
        if settings.policy == "plan" and not self.run.workload:
            count = len(parse_plan(settings.plan))
            if count != n_layers:
                raise ConflictError(
                    f"activation_checkpoint.plan is for {count} blocks, and model.n_layers = {n_layers}",
                    *("activation_checkpoint.plan", "model.n_layers"),
                )
        return self
