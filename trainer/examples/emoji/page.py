"""One page that shows what selection did: pairs chosen most, pairs refused, and what was wrong with them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import torch
from noise import KINDS
from pairs import CLEAN, Pairs
from pictures import VENDORS
from PIL import Image

if TYPE_CHECKING:
    from outcome import Results
    from torch import Tensor
    from training import Account

SHOWN = 28
MIN_SEEN = 8  # a pair met once or twice says nothing about selection
_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Shown:
    """A pair of the pool with what happened to it."""

    row: int
    seen: int
    trained: int


def write_page(results: Results, pool: Pairs, curves: Path, path: Path) -> None:
    """Write a self-contained page: every picture is inside it."""
    account = results.jest.account
    chosen, refused = most_chosen_and_refused(account, pool)
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        verdict=escape(results.verdict()),
        tiles=_tiles(results),
        curves=_data_uri(curves.read_bytes()),
        kinds=_kinds(account, pool),
        chosen=_cards(chosen, pool),
        refused=_cards(refused, pool),
        notes="\n".join(f"<li>{escape(note)}</li>" for note in results.notes()),
        credits=_credits(),
    )
    path.write_text(page, encoding="utf-8")


def most_chosen_and_refused(account: Account, pool: Pairs) -> tuple[list[Shown], list[Shown]]:
    """Sort pairs by the share of their appearances that were trained on; at most one pair of each drawing."""
    often_seen = (account.times_seen >= MIN_SEEN).nonzero().flatten().tolist()
    pairs = [Shown(row, int(account.times_seen[row]), int(account.times_trained[row])) for row in often_seen]
    chosen = sorted(pairs, key=lambda pair: (-pair.trained / pair.seen, -pair.seen, pair.row))
    refused = sorted(pairs, key=lambda pair: (pair.trained / pair.seen, -pair.seen, pair.row))
    return _one_per_drawing(chosen, pool), _one_per_drawing(refused, pool)


def _one_per_drawing(pairs: list[Shown], pool: Pairs) -> list[Shown]:
    first: dict[int, Shown] = {}
    for pair in pairs:
        first.setdefault(pool.pairs[pair.row].picture, pair)
        if len(first) == SHOWN:
            break
    return list(first.values())


def _tiles(results: Results) -> str:
    ratio = "not reached" if results.examples_ratio is None else f"{results.examples_ratio:.1f}&times;"
    seconds = "not reached" if results.seconds_ratio is None else f"{results.seconds_ratio:.1f}&times;"
    reference = "not measured" if results.reference is None else f"{results.reference.final.retrieval.mean:.1%}"
    tiles = {
        "R@1, uniform": f"{results.uniform.final.retrieval.mean:.1%}",
        "R@1, JEST": f"{results.jest.final.retrieval.mean:.1%}",
        "R@1, reference model": reference,
        "fewer examples trained on to reach uniform's result": ratio,
        "uniform's wall-clock over JEST's to the same result": seconds,
    }
    return "\n".join(
        f'<div class="tile"><strong>{value}</strong><span>{escape(name)}</span></div>' for name, value in tiles.items()
    )


def _kinds(account: Account, pool: Pairs) -> str:
    rows = []
    for kind in (CLEAN, *KINDS):
        of_kind = [row for row, pair in enumerate(pool.pairs) if pair.kind == kind]
        seen = _share(account.times_seen, of_kind)
        trained = _share(account.times_trained, of_kind)
        rows.append(
            f"<tr><th>{escape(kind)}</th><td>{_bar(seen, 'loaded')}</td><td>{_bar(trained, 'trained')}</td></tr>"
        )
    return "\n".join(rows)


def _share(times: Tensor, rows: list[int]) -> float:
    return float(times[rows].sum() / times.sum().clamp(min=1))


def _bar(share: float, name: str) -> str:
    return f'<div class="bar {name}"><i style="width:{share:.2%}"></i><b>{share:.1%}</b></div>'


def _cards(shown: list[Shown], pool: Pairs) -> str:
    pictures = pool.batch(torch.tensor([pair.row for pair in shown], dtype=torch.int64))["image"]
    return "\n".join(_card(pair, pool, picture) for pair, picture in zip(shown, pictures, strict=True))


def _card(shown: Shown, pool: Pairs, picture: Tensor) -> str:
    pair = pool.pairs[shown.row]
    clean = pair.kind == CLEAN
    remark = pair.kind if clean else f"{pair.kind}; shows: {pair.shows}"
    return (
        f'<figure class="{"clean" if clean else "useless"}">'
        f'<img alt="{escape(pair.shows)}" width="64" height="64" src="{_data_uri(_png(picture))}">'
        f"<figcaption>{escape(pair.caption)}</figcaption>"
        f'<p class="kind">{escape(remark)}</p>'
        f"<p>chosen {shown.trained:,} of {shown.seen:,}</p></figure>"
    )


def _png(picture: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _credits() -> str:
    return "\n".join(
        f'<li><a href="{vendor.source_url}">{escape(vendor.credit)}</a>, '
        f'<a href="{vendor.licence_url}">{escape(vendor.licence)}</a>; scaled to 32&times;32 pixels on white</li>'
        for vendor in VENDORS
    )
