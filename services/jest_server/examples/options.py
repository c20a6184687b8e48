"""What `jest-server embed` is told, checked before anything is read."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from itertools import product

from jest_server.domain.super_batches import MAX_KEY_BYTES

MAX_URLS = 1_000_000
_KEY_FIELDS = {"key", "shard"}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class EmbedOptions:
    """See the command's help.

    Raises:
        ValueError: Naming option, value and expectation.
    """

    data: str
    output: str
    preprocess: str
    key: str = "{key}"
    caption: str = "txt"
    batch: int = 256
    shard_index: int = 0
    num_shards: int = 1
    folder_shard_examples: int = 10_000
    max_member_bytes: int = 64 << 20
    max_left_out: float = 0.01

    def __post_init__(self) -> None:
        for name in ("data", "output", "preprocess"):
            _expect(bool(getattr(self, name)), name, "''", "a name")
        for name in ("batch", "num_shards", "folder_shard_examples", "max_member_bytes"):
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _expect(
            0 <= self.shard_index < self.num_shards,
            "shard_index",
            self.shard_index,
            f"0 to {self.num_shards - 1}: --num-shards is {self.num_shards}",
        )
        _expect(0 <= self.max_left_out <= 1, "max_left_out", self.max_left_out, "a share from 0 to 1")
        _expect(
            bool(re.fullmatch(r"[\w.]+:[\w.]+", self.preprocess)),
            "preprocess",
            repr(self.preprocess),
            "MODULE:FUNCTION",
        )
        _expect(bool(re.fullmatch(r"txt|json:.+", self.caption)), "caption", repr(self.caption), "txt, or json:FIELD")
        _check_key(self.key)

    def example_key(self, *, key: str, shard: str) -> str:
        """Names an example as the trainers do.

        Raises:
            ValueError: If the name is longer than any that a trainer can submit.
        """
        made = self.key.format(key=key, shard=shard)
        if len(made.encode()) > MAX_KEY_BYTES:
            raise ValueError(f"is {len(made.encode())} bytes long, expected up to {MAX_KEY_BYTES}")
        return made


def _check_key(template: str) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"--key is {template!r}, expected a template such as '{{shard}}/{{key}}': {error}") from error
    fields = {field for _, field, _, _ in parts if field is not None}
    plain = not any(form or conversion for _, _, form, conversion in parts)
    _expect(
        fields <= _KEY_FIELDS and "key" in fields and plain,
        "key",
        repr(template),
        "a template with {key} in it and, where names repeat from shard to shard, {shard}",
    )


def _expect(right: bool, option: str, value: object, expectation: str) -> None:
    if not right:
        raise ValueError(f"--{option.replace('_', '-')} is {value}, expected {expectation}")


def expand_braces(pattern: str) -> list[str]:
    """Expands `{000..099}` and `{a,b}` as a shell does, several of them in all combinations.

    Raises:
        ValueError: If braces hold anything else, or make too many names.
    """
    pieces = _BRACES.split(pattern)
    choices = [[piece] if place % 2 == 0 else _choices(piece, pattern) for place, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    _expect(count <= MAX_URLS, "data", repr(pattern), f"names of up to {MAX_URLS} files, not {count}")
    return ["".join(parts) for parts in product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers:
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        _expect(
            int(first) <= int(last) < int(first) + MAX_URLS,
            "data",
            repr(pattern),
            "ascending ranges such as {000..099}",
        )
        return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    _expect("," in inside, "data", repr(pattern), "braces with a range {000..099} or a list {a,b}")
    return inside.split(",")
