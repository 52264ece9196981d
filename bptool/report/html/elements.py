"""HTML as a tree of elements, so that whatever a user's names hold is escaped when it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from xml.etree.ElementTree import Element, tostring

from bptool.report.text import visible

Attributes = Mapping[str, str]


def element(tag: str, attributes: Attributes | None = None, *children: Element | str) -> Element:
    """An element with text and elements in it; what is no character to print is spelt out."""
    made = Element(tag, {name: _text(value) for name, value in (attributes or {}).items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + _text(child)
        else:
            made.text = (made.text or "") + _text(child)
    return made


def _text(text: str) -> str:
    """A file's name may hold bytes that are no text: Python keeps them as lone surrogates, which no file can hold."""
    return visible(text).encode("utf-8", "backslashreplace").decode()


def styled(tag: str, kind: str, *children: Element | str) -> Element:
    """An element of a CSS class."""
    return element(tag, {"class": kind}, *children)


def data_block(value: object) -> Element:
    """JSON for the page's script to read; nothing in it can end the block."""
    block = Element("script", {"type": "application/json"})
    block.text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return block


def markup(root: Element) -> str:
    """The tree as HTML text."""
    return tostring(root, encoding="unicode", method="html")
