"""The page around what a report says: one file that loads nothing, and is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from .style import style


def document(title: str, body: str, *, allowed: str = "", css: str = "") -> str:
    """A page of HTML.

    Args:
        title: of the window, escaped.
        body: what stands in the body.
        allowed: what the page may use besides its style, as of a Content-Security-Policy: "img-src data:;".
        css: rules behind those of `style`.
    """
    policy = " ".join(("default-src 'none';", *filter(None, (allowed,)), "style-src 'unsafe-inline'"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style()}{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there whole, or as it was before."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(content)
    os.replace(draft, path)
