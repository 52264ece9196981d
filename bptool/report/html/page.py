"""The shell of every page: one file that needs no network and reads without scripts; one look for all commands."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from xml.etree.ElementTree import Element

from bptool import __version__
from bptool.report.html.elements import element, markup, styled

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


def page(command: str, title: str, subtitle: str, body: Sequence[Element]) -> str:
    """A whole HTML document.

    Args:
        command: the bptool command whose page it is.
        title: what it is about.
        subtitle: in a line, the circumstances.
        body: its sections, the answer first.
    """
    head = element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, f"{title} · bptool {command}"),
        _verbatim("style", "style.css"),
    )
    header = element(
        "header",
        None,
        styled("p", "eyebrow", f"bptool {command}"),
        element("h1", None, title),
        element("p", None, subtitle),
    )
    footer = element("footer", None, f"Made by bptool {__version__}. This page is one file and loads nothing.")
    main = element("main", None, header, *body, footer)
    root = element("html", {"lang": "en"}, head, element("body", None, main, _verbatim("script", "page.js")))
    return "<!DOCTYPE html>\n" + markup(root) + "\n"


def section(heading: str, *children: Element | str) -> Element:
    """A part of the page under a heading of its own."""
    return element("section", None, element("h2", None, heading), *children)


def _verbatim(tag: str, file: str) -> Element:
    """A file of ours, as it is: neither style nor script is escaped in HTML."""
    made = Element(tag)
    made.text = files("bptool.report.html").joinpath(file).read_text("utf-8")
    return made
