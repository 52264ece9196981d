"""FLOPs of a token by every convention in use, side by side: an MFU means nothing without its own.

    6 N_all              all parameters that a token can meet, the embedding too: "C = 6 N D" as scaling laws are read
                         (Hoffmann et al. 2022, appendix F, count the embedding's matrices)
    6 N                  N: the weights that a token is multiplied with, the output projection but no lookup among them
                         (Kaplan et al. 2020, section 2.1, who leave attention's scores out, and that projection too)
    6 N + 12 L H Q T     and attention's two products over all T x T scores (Chowdhery et al. 2022, "PaLM", appendix B)
    6 N + 6 L H Q T      attention halved, as a causal mask leaves half of the scores (Dao 2023, "FlashAttention-2",
                         section 4.1)
    executed             what is really done: attention's scores computed again, recomputation, missing gradients; HFU.
                         All T x T scores are counted, also where a kernel leaves out those that a causal mask hides

N, L, H, Q and T are parameters, layers, heads, head width and tokens of a sequence. Not one counts the optimizer.
"""

from __future__ import annotations

from bptool.analysis.profile.result import Convention
from bptool.analysis.profile.tally import Tally
from bptool.config.schema import Config
from bptool.model.accounting import count_parameters, flops_per_token

PALM = "6N + 12LHQT"
MODEL = "model FLOPs, counted"
EXECUTED = "executed"


def conventions(tally: Tally, units_per_step: int, config: Config | None) -> list[Convention]:
    """Every convention that applies, without MFUs.

    Args:
        units_per_step: tokens, or whatever the workload counts.
        config: of the built-in transformer; None for a user's own model, whose matrices' weights are not known: what
            was counted is then the headline.
    """
    found = [] if config is None else _of_transformer(config)
    return [*found, _model(tally, units_per_step, headline=config is None), _executed(tally, units_per_step)]


def executed_flops(tally: Tally) -> int:
    """All FLOPs of the step's products, recomputation among them: what HFU divides by."""
    return tally.flops("forward", "dgrad", "wgrad", "recompute")


def model_flops(tally: Tally) -> int:
    """The same without recomputation."""
    return tally.flops("forward", "dgrad", "wgrad")


def _of_transformer(config: Config) -> list[Convention]:
    settings, n_tokens = config.model, config.training.sequence_length
    palm = flops_per_token(settings, n_tokens)
    weights = flops_per_token(settings, 0)  # attention's part is proportional to the length
    everything = 6 * count_parameters(settings).active
    return [
        _convention("6N_all", "6 N_all", "all parameters, embeddings too; no attention scores (6ND)", everything),
        _convention("6N", "6 N", "the weights that a token is multiplied with; no attention scores (Kaplan)", weights),
        _convention(
            PALM, "6 N + 12 L H Q T", "and attention over all T x T scores (PaLM, nanoGPT, torchtitan)", palm, True
        ),
        _convention(
            "6N + 6LHQT",
            "6 N + 6 L H Q T",
            "and attention over the half that a causal mask leaves (FlashAttention-2)",
            weights + (palm - weights) / 2,
        ),
    ]


def _model(tally: Tally, units: int, headline: bool) -> Convention:
    counts = "forward, dgrad and wgrad as counted here, operation by operation"
    return _convention(MODEL, "forward + dgrad + wgrad", counts, model_flops(tally) / units, headline)


def _executed(tally: Tally, units: int) -> Convention:
    counts = "the same and what is recomputed, attention over all T x T scores: all that is done (HFU)"
    return _convention(EXECUTED, "forward + dgrad + wgrad + recompute", counts, executed_flops(tally) / units)


def _convention(name: str, formula: str, counts: str, flops: float, headline: bool = False) -> Convention:
    return Convention(
        name=name, formula=formula, counts=counts, flops_per_unit=float(flops), mfu=None, headline=headline
    )
