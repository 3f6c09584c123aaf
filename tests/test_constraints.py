"""Sets of allowed values: what is in them, and how they print."""

import pytest

from attnsel_jax.constraints import ANYTHING, AtLeast, MultipleOf, OneOf, every_value


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (OneOf(64, 128), (64, 128), (0, 96), "one of 64, 128"),
        (OneOf(64), (64,), (63,), "64"),
        (OneOf(), (), (0, None), "nothing"),
        (MultipleOf(8), (8, 16, 800), (0, -8, 12), "a multiple of 8"),
        (MultipleOf(8, at_most=256), (8, 256), (0, 264), "a multiple of 8, at most 256"),
        (AtLeast((9, 0)), ((9, 0), (10, 0)), ((8, 9),), "at least 9.0"),
        (ANYTHING, (0, "x", None), (), "anything"),
    ],
)
def test_a_constraint_answers_in_and_prints_as_the_end_of_must_be(allowed, inside, outside, text):
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert all(value in allowed for value in allowed.samples())
    assert str(allowed) == text


def test_every_value_is_listed_only_where_they_end():
    assert every_value(OneOf(64, 128)) == [64, 128]
    assert every_value(MultipleOf(8, at_most=24)) == [8, 16, 24]
    assert every_value(MultipleOf(8)) is None
    assert every_value(ANYTHING) is None
