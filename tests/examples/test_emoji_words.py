import pytest
from words import UNKNOWN, Vocabulary, split_words


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Woman Astronaut: medium-skin tone", ["woman", "astronaut", "medium", "skin", "tone"]),
        ("fußgängerin", ["fussgängerin"]),
        ("赛马 中等肤色", ["赛", "马", "中", "等", "肤", "色"]),
        ("  ", []),
    ],
)
def test_captions_are_split_into_words(caption, words):
    assert split_words(caption) == words


def test_numbers_do_not_depend_on_the_order_of_the_captions():
    one, other = Vocabulary(["red apple", "dog"]), Vocabulary(["dog", "apple", "red"])
    assert one.tokenize(["red dog"]).tolist() == other.tokenize(["red dog"]).tolist()
    assert one.id == other.id


def test_other_words_give_another_id():
    assert Vocabulary(["red apple"]).id != Vocabulary(["green apple"]).id


def test_captions_are_padded_with_zeros_and_cut_at_the_end():
    tokens = Vocabulary(["a b c"], max_words=2).tokenize(["b", "c b a", "zebra", ""])
    assert tokens.tolist() == [[3, 0], [4, 3], [UNKNOWN, 0], [0, 0]]
