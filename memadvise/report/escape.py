"""Names from a user's model made harmless for whatever reads them: a terminal, Markdown, XML, a workflow's log."""

from __future__ import annotations

import html
import re

_MAX_NAME = 300
# Control characters, line and paragraph separators, and what turns the direction of writing: none of them is a name.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\uffff\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Characters that a terminal or a log would act on, written out: a newline as ``\n``, an escape as ``\x1b``."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def shortened(name: str) -> str:
    """A name of a page's length without its middle."""
    half = _MAX_NAME // 2
    return name if len(name) <= _MAX_NAME else f"{name[:half]}...{name[-half:]}"


def xml(text: str) -> str:
    """Text or the inside of an attribute, in ASCII; what XML cannot hold is written out."""
    kept = "\n".join(visible(line) for line in text.split("\n"))
    return html.escape(kept).replace("\n", "&#10;").encode("ascii", "xmlcharrefreplace").decode("ascii")


def log_line(text: str) -> str:
    """One line of a workflow's log that is no command, whatever it says."""
    line = visible(text).replace("##[", "# #[")
    return f"\\{line}" if line.lstrip().startswith("::") else line


def annotation(level: str, message: str, *, file: str | None = None, line: int | None = None, title: str = "") -> str:
    """A workflow command such as ``::error file=model.py,line=88,title=...::...``."""
    given = {"file": file, "line": line, "title": title or None}
    properties = ",".join(f"{key}={_property(str(value))}" for key, value in given.items() if value is not None)
    return f"::{level} {properties}::{_data(message)}"


def _data(text: str) -> str:
    escaped = text.replace("##[", "# #[").replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return visible(escaped)


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
