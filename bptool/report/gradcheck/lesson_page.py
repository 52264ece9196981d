"""The identities of backpropagation as a lesson on a page: what each says, why, and this model's own figures."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from bptool.analysis.gradcheck.identities.identity import Identity
from bptool.report.html.elements import element, styled
from bptool.report.html.page import section
from bptool.report.html.parts import Column, bar, swatch, table

_WHY = {
    "logits_gradient": "What the model said minus what was right: the gradient at the logits needs no chain of rules."
    " Each counted token's row adds up to 0, and a token that is ignored sends nothing.",
    "residual_paths": "A block adds its branch to what comes in, so the gradient comes back twice: once as it is, once"
    " through the branch. Where the first is the larger one, depth does not make gradients vanish.",
    "attention_query_gradient": "Queries meet keys in the scores, S = Q K^T / sqrt(d), so the scale belongs to the"
    " gradient as it belongs to the scores.",
    "attention_key_gradient": "The same product from its other side: the scores' gradient is transposed, and the"
    " softmax's own backward takes off each row's weighted mean.",
    "attention_value_gradient": "Values are mixed by the attention weights on the way forward, and gradients by the"
    " same weights, transposed, on the way back.",
    "layer_order": "A layer's gradient needs what the layer after it sends back, so the backward visits the layers"
    " from the loss to the embedding.",
    "accumulation": "A gradient of a mean is a mean of gradients, if each micro-batch weighs as many tokens as it"
    " counts: averages of averages are another number.",
    "activation_checkpointing": "What is thrown away and computed again is the same number again, to the last bit, if"
    " the random numbers are drawn again too.",
    "clipping_norm": "Clipping looks at all gradients as one long vector, and makes it shorter without turning it.",
    "gradient_descent_update": "All of it is for this: each weight goes against its gradient.",
}


def lesson(identities: Sequence[Identity]) -> list[Element]:
    """A section with each identity, those that fail first, and how the gradient divides at each residual block."""
    ordered = sorted(identities, key=lambda one: one.holds)
    lead = (
        "Equations between gradients that hold in every model with such parts, computed twice on this one: by"
        " autograd, and by the formula."
    )
    found = [section("A lesson: the identities of backpropagation", styled("p", "lead", lead), *map(_told, ordered))]
    paths = next((one for one in identities if one.name == "residual_paths" and one.figures), None)
    return [*found, *([_paths(paths)] if paths else [])]


def _told(identity: Identity) -> Element:
    name = identity.name.replace("_", " ")
    kind, word = ("mark-yes", "holds") if identity.holds else ("mark-no", "fails")
    why = [styled("p", "lead", _WHY[identity.name])] if identity.name in _WHY else []
    figures = styled("p", "place", identity.detail)
    return element(
        "details",
        {"open": "", "class": "told"},
        element("summary", None, element("strong", None, name), " ", styled("span", kind, word)),
        *why,
        figures,
    )


def _paths(identity: Identity) -> Element:
    """Each block's two norms as bars on one scale, the last block first, as the backward meets them."""
    figures = identity.figures
    blocks = [key.removesuffix(".branch_norm") for key in figures if key.endswith(".branch_norm")]
    most = max(figures.values()) or 1.0

    def cell(block: str, path: str, kind: str) -> Element:
        value = figures.get(f"{block}.{path}_norm", 0.0)
        return element("span", None, bar(value / most, kind), f" {value:.3g}")

    headings = [("identity path", "identity", "c-forward"), ("branch path", "branch", "c-dgrad")]
    rows: list[list[Element | str]] = [
        [block, *(cell(block, path, kind) for _, path, kind in headings)] for block in reversed(blocks)
    ]
    columns = [Column("block, as the backward meets it"), *(Column(words) for words, _, _ in headings)]
    legend = styled("p", "legend", *(element("span", None, swatch(kind), words) for words, _, kind in headings))
    lead = styled("p", "lead", "Norms of the gradient that each block passes on, by its two paths.")
    return section("Where the gradient comes through", lead, table(columns, rows), legend)
