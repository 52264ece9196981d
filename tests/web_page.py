"""Reads a page as strictly as HTML allows: every element is closed in order."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_VOID = {"meta", "br", "hr", "img", "input", "link"}


class WebPage(HTMLParser):
    """A page's elements and words.

    Attributes:
        elements: tag and attributes of each, in order.
        words: its text nodes, without scripts and style.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    def tags(self) -> set[str]:
        """The kinds of elements that there are."""
        return {tag for tag, _ in self.elements}

    def attributes(self) -> set[str]:
        """The names of attributes that there are."""
        return {name for _, attributes in self.elements for name in attributes}


def assert_stands_alone(text: str) -> None:
    """A page that asks for nothing: no address, nothing that loads, and a policy that would refuse it."""
    page = WebPage(text)
    assert not page.attributes() & {"src", "srcset", "href", "xlink:href", "action", "data", "background", "poster"}
    assert not page.tags() & {"link", "iframe", "object", "embed", "base", "img", "form"}
    assert not [name for name in page.attributes() if name.startswith("on")]
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import|\bimport\b|fetch\(|XMLHttpRequest", text)
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    allowed = {rule.split()[0]: rule.split()[1:] for rule in (policies[0] or "").split(";")}
    assert allowed["default-src"] == ["'none'"]
    assert set(allowed) <= {"default-src", "style-src", "script-src", "base-uri", "form-action"}
    assert {source for sources in allowed.values() for source in sources} <= {"'none'", "'unsafe-inline'"}
