"""Examples by reference: which URLs a deployment lets its scorers read.

A source is the URL of a picture, beside which its caption lies, or `URL#KEY`: the example KEY of a WebDataset tar. What
may be read is told by prefixes; everything that could lead somewhere else is refused before anybody opens anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

MAX_SOURCE_BYTES = 2048
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
_TAR = ".tar"
_FILE = "file://"


@dataclass(frozen=True)
class Source:
    """Where one example is."""

    url: str
    member: str | None
    """Its key in the tar at ``url``; None: the URL is its picture's."""


class AllowedSources:
    """What may be read: URLs that start with one of some prefixes.

    Raises:
        ValueError: If a prefix could mean more than what lies under it.
    """

    def __init__(self, prefixes: tuple[str, ...]) -> None:
        for prefix in prefixes:
            if not _SCHEME.match(prefix) or not prefix.endswith("/") or not urlsplit(prefix).path:
                raise ValueError(
                    f"JEST_SOURCE_PREFIXES has {prefix!r}, expected SCHEME://PLACE/ with the slash at its end"
                )
        self._prefixes = prefixes

    def check(self, text: str) -> Source:
        """Takes a source apart.

        Raises:
            ValueError: If it may not be read here, with what was expected.
        """
        url, hash_, member = text.partition("#")
        if len(text.encode()) > MAX_SOURCE_BYTES:
            raise ValueError(f"is {len(text.encode())} bytes long, expected up to {MAX_SOURCE_BYTES}")
        if not self._prefixes:
            raise ValueError(f"is {text!r}, but this server reads no sources: JEST_SOURCE_PREFIXES is empty")
        prefix = next((prefix for prefix in self._prefixes if url.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"is {text!r}, expected a URL that starts with one of {', '.join(self._prefixes)}")
        _check_rest(url.removeprefix(prefix), text)
        if bool(hash_) != url.endswith(_TAR):
            raise ValueError(f"is {text!r}, expected URL{_TAR}#KEY for an example in a tar, else the URL of a picture")
        if hash_ and not member:
            raise ValueError(f"is {text!r}, expected the example's key after the #")
        return Source(url, member if hash_ else None)

    def check_local(self, path: Path) -> None:
        """Checks where a local path really is, links followed.

        Raises:
            ValueError: If that is under none of the allowed folders.
        """
        folders = [Path(prefix.removeprefix(_FILE)).resolve() for prefix in self._prefixes if prefix.startswith(_FILE)]
        if not any(path.is_relative_to(folder) for folder in folders):
            raise ValueError("is under none of the allowed folders")


def _check_rest(rest: str, text: str) -> None:
    """Refuses whatever is not a plain path downwards, however it is written."""
    if unquote(rest) != rest or not rest.isprintable() or any(sign in rest for sign in "\\?*[]{}") or "::" in rest:
        raise ValueError(f"is {text!r}, expected a plain path: no escapes, wildcards, queries or chained URLs")
    if any(part in {"", ".", ".."} for part in rest.split("/")):
        raise ValueError(f"is {text!r}, expected a path without empty parts, '.' or '..'")
