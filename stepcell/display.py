"""Text that leaves the program, in messages, logs, reports and metrics: without secrets, and safe for a terminal.

A URL may hold a password, and text from a file (names, doc strings, tags of a container) anything at all. What could be
a secret is hidden even where it may be none: `@` and `/` may be part of a password, so everything before the last `@`
of a URL is.
"""

from __future__ import annotations

import re

__all__ = ["displayed", "printable", "redacted"]

HIDDEN = "***"


def _percent(code: str) -> str:
    """Pattern of a percent-encoded character, encoded any number of times."""
    return f"%(?:25)*{code}"


# The beginning of a URL, also of one inside the query of another. pathlib turns `://` into `:/`.
_BEGIN = re.compile(rf"([a-z][a-z0-9+.\-]+)(?::|{_percent('3a')})(?:/|{_percent('2f')}){{1,3}}", re.IGNORECASE)
_AT = re.compile("@")
_ANY_AT = re.compile(rf"@|{_percent('40')}")
# `?password=...`, `&access_token=...`, and the `/user=..._password=...` of some cameras. A value ends at `&`, at white
# space or at the next key; punctuation of the sentence around it is kept.
_SECRET = re.compile(
    rf"((?:(?:[?&;]|{_percent('3f')}|{_percent('26')}|{_percent('3b')})[\w.%\-\[\]]*?"
    r"(?:pass|pwd|psw|psk|token|secret|key|auth|sig|cred|session|jwt|streamid)|[/_](?:pass|pwd))[\w.%\-\[\]]*?"
    rf"(?:=|{_percent('3d')}))"
    rf"[^&\s]*?(?=_[a-z]+=|{_percent('26')}|[:,.)'\"\]]*(?:[&\s]|$))",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(authorization:\s*\w+\s+)\S+", re.IGNORECASE)
# Control characters but newline and tab, those that change the direction of text, and invalid Unicode.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def redacted(text: str) -> str:
    """Text whose URLs have no user, password, token or key; each is replaced by asterisks."""
    if "=" in text or "%" in text:
        text = _SECRET.sub(rf"\1{HIDDEN}", text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    end = len(text)
    for begin in reversed(list(_BEGIN.finditer(text))):
        url = text[begin.end() : end].split(None, 1)
        end = begin.start()
        if begin[1].lower() == "file" or not url or text[begin.end()].isspace():
            continue
        found = list((_ANY_AT if "%" in begin[0] else _AT).finditer(url[0]))
        if found:
            text = text[: begin.end()] + HIDDEN + text[begin.end() + found[-1].start() :]
    return text


def printable(text: str) -> str:
    r"""Text without control characters, which a terminal would obey: `\x1b` is shown as four characters.

    Newlines and tabs are kept. Characters that reverse the direction of text, and bytes of file names that are not
    valid Unicode, are escaped too.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def displayed(text: str) -> str:
    """`printable` and `redacted`: what may be shown or written down."""
    return printable(redacted(text))
