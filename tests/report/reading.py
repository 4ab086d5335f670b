"""What tests of the report read: a page, and what is said of runs."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from flashsigmoid.report.arms import Arm, group_arms, load_runs
from flashsigmoid.report.summary import statement

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes, ids and text of a page; fails where tags do not close."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def arms_of(*folders: Path) -> list[Arm]:
    return group_arms(load_runs(folders))


def told(*folders: Path) -> str:
    return " ".join(statement(arms_of(*folders)))
