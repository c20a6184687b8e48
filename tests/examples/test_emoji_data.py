import itertools
from collections import Counter

import data
import pictures
import pytest
import torch
from captions import load_emoji
from noise import KINDS
from pairs import example_key
from pictures import VENDORS


def _drawn_emoji(pairs):
    return {pair.picture for pair in pairs.pairs}


def test_there_are_thousands_of_emoji_each_by_two_vendors(prepared):
    emoji = load_emoji()
    assert len(emoji) > 3500
    drawn = set().union(*(_drawn_emoji(part) for part in (prepared.stream, prepared.validation, prepared.test)))
    assert len(drawn) == len(emoji) * len(VENDORS)


def test_pictures_are_thirty_two_by_thirty_two_bytes_on_white(prepared):
    image = prepared.test.batch(torch.arange(64))["image"]
    assert image.dtype == torch.uint8
    assert image.shape == (64, 3, 32, 32)
    corners = image[:, :, 0, 0].float().mean(dim=1)
    assert (corners == 255).float().mean() > 0.5


def test_the_same_seed_gives_the_same_pairs_and_the_same_stream(prepared, cache_dir):
    again = data.prepare(cache_dir, seed=7, curated_pairs=500)
    for part in ("curated", "stream", "validation", "test"):
        assert getattr(again, part).pairs == getattr(prepared, part).pairs
    first, second = (next(itertools.islice(one.stream_batches(64, 3), 2, None)) for one in (prepared, again))
    assert first["keys"] == second["keys"]
    assert torch.equal(first["image"], second["image"])
    assert torch.equal(first["tokens"], second["tokens"])
    assert again.preprocessing_id == prepared.preprocessing_id


def test_another_seed_holds_out_other_drawings(prepared, cache_dir):
    other = data.prepare(cache_dir, seed=8, curated_pairs=500)
    assert _drawn_emoji(other.test) != _drawn_emoji(prepared.test)


def test_the_size_of_the_curated_part_does_not_move_the_stream(prepared, cache_dir):
    other = data.prepare(cache_dir, seed=7, curated_pairs=20)
    assert other.stream.keys == prepared.stream.keys


def test_no_held_out_drawing_is_in_any_training_pair(prepared):
    training = _drawn_emoji(prepared.stream) | _drawn_emoji(prepared.curated)
    held_out = _drawn_emoji(prepared.test) | _drawn_emoji(prepared.validation)
    assert not training & held_out
    assert not _drawn_emoji(prepared.test) & _drawn_emoji(prepared.validation)


def test_validation_and_test_share_no_emoji(prepared):
    validation, test = (
        {picture // len(VENDORS) for picture in _drawn_emoji(part)} for part in (prepared.validation, prepared.test)
    )
    assert not validation & test


def test_held_out_captions_are_all_different(prepared):
    for part in (prepared.validation, prepared.test):
        assert len({tuple(row) for row in part.tokens.tolist()}) == len(part)


def test_the_curated_part_is_clean(prepared):
    assert {pair.kind for pair in prepared.curated.pairs} == {"clean"}
    assert len(prepared.curated) == 500


def test_about_half_of_what_the_stream_brings_is_useless(prepared):
    batch = next(prepared.stream_batches(20_000, seed=1))
    kinds = Counter(prepared.stream.pairs[row].kind for row in batch["index"].tolist())
    assert 0.45 < 1 - kinds["clean"] / 20_000 < 0.55


def test_every_kind_of_useless_caption_occurs(prepared):
    assert {pair.kind for pair in prepared.stream.pairs} == {"clean", *KINDS}


def test_a_clean_caption_belongs_to_the_emoji_that_is_shown(prepared):
    emoji = load_emoji()
    for pair in prepared.stream.pairs:
        if pair.kind == "clean":
            shown = emoji[pair.picture // len(VENDORS)]
            assert pair.caption in {*shown.names.values(), *shown.keywords}


def test_the_head_of_the_stream_is_heavily_duplicated(prepared):
    batch = next(prepared.stream_batches(20_000, seed=1))
    shown = Counter(prepared.stream.pairs[row].picture // len(VENDORS) for row in batch["index"].tolist())
    counts = [count for _, count in shown.most_common(100)]
    assert counts[0] / 20_000 == pytest.approx(1 / 8.85, rel=0.1)  # 1 / H(3930)
    assert sum(counts) / 20_000 == pytest.approx(5.19 / 8.85, rel=0.1)  # H(100) / H(3930)


def test_equal_pairs_have_equal_keys_and_different_pairs_different_ones(prepared):
    stream = prepared.stream
    content = {}
    for key, pair in zip(stream.keys, stream.pairs, strict=True):
        assert content.setdefault(key, (pair.picture, pair.caption)) == (pair.picture, pair.caption)
    assert len(content) == len({(pair.picture, pair.caption) for pair in stream.pairs})


def test_a_key_depends_on_nothing_but_the_drawing_and_the_caption():
    assert example_key("twemoji/1f34e", "red apple") == "5900164c9d95638d90e09438d2748566"
    assert example_key("openmoji/1f34e", "red apple") != example_key("twemoji/1f34e", "red apple")


def test_a_curated_part_larger_than_all_clean_pairs_is_refused(cache_dir):
    with pytest.raises(ValueError, match=r"curated_pairs \(1000000\) is larger than"):
        data.prepare(cache_dir, seed=7, curated_pairs=1_000_000)


def test_a_cache_of_other_emoji_is_drawn_anew(tmp_path):
    apple = pictures.load_pictures(["1f34e"], tmp_path)
    both = pictures.load_pictures(["1f34e", "1f34f"], tmp_path)
    assert both.shape == (2, 2, 3, 32, 32)
    assert torch.equal(both[0], apple[0])
    assert not torch.equal(both[0], both[1])
