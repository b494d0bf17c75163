"""What is searched: the language of search spaces, its refusals, and what a point of one does to a recipe."""

from dataclasses import replace

import pytest
from search_recipe import Outer, Quadratic

from bilevel.search.flags import split_space, to_flags
from bilevel.search.space import Choices, Numbers, apply_values, distance, drawn_values, parse_space


def parse(name, text):
    return parse_space(Quadratic(), {name: text})[name.replace("-", "_")]


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("rate", "log:1e-3..1", Numbers(1e-3, 1.0, log=True)),
        ("rate", "float:0..1", Numbers(0.0, 1.0)),
        ("rate", "lin:-1..1", Numbers(-1.0, 1.0)),
        ("rate", "1e-3..1", Numbers(1e-3, 1.0)),
        ("rate", "float:0..1:0.25", Numbers(0.0, 1.0, step=0.25)),
        ("rate", "int:1..3", Numbers(1, 3, whole=True, as_float=True)),
        ("num-steps", "int:1..10", Numbers(1, 10, whole=True)),
        ("num_steps", "1..10", Numbers(1, 10, whole=True)),
        ("num-steps", "int:log:16..256", Numbers(16, 256, whole=True, log=True)),
        ("num-steps", "int:8..65:8", Numbers(8, 64, whole=True, step=8)),
        ("num-steps", "1|2|4", Choices(("1", "2", "4"), (1, 2, 4))),
        ("kind", "plain|shifted", Choices(("plain", "shifted"), ("plain", "shifted"))),
        ("bias", "true|no", Choices(("true", "no"), (True, False))),
        ("limit", "none|3", Choices(("none", "3"), (None, 3))),
        ("limit", "int:1..4", Numbers(1, 4, whole=True)),
        ("fail", "none|3", Choices(("none", "3"), ("none", "3"))),
        ("widths", "64,64|128", Choices(("64,64", "128"), ((64, 64), (128,)))),
        ("outer.rate", "log:0.1..1", Numbers(0.1, 1.0, log=True)),
        ("loop.chunk-size", "int:1..2", Numbers(1, 2, whole=True)),
    ],
)
def test_a_text_is_read_as_the_type_of_its_field(name, text, expected):
    assert parse(name, text) == expected


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("rat", "log:1e-3..1", "has no field rat; did you mean rate"),
        ("outer.rates", "log:1e-3..1", "did you mean outer.rate"),
        ("rate.x", "log:1e-3..1", "has no field rate.x"),
        ("outer", "0..1", "group of fields; search one of outer.rate"),
        ("rate", "log:0..1", "logarithm of 0"),
        ("rate", "log:-1..1", "logarithm of -1"),
        ("rate", "1..1", "the range is empty"),
        ("rate", "float:2..1", "the range is empty"),
        ("rate", "float:0..inf", "finite"),
        ("rate", "float:a..1", "'a' is no number"),
        ("rate", "float:0..", "two ends"),
        ("rate", "log:0.1", "low..high"),
        ("rate", "half:0..1", "no kind half"),
        ("rate", "log:1..4:2", "a step"),
        ("rate", "float:0..1:3", "a step"),
        ("rate", "a|b", "'a' is not float"),
        ("num-steps", "float:1..3", "whole numbers"),
        ("num-steps", "log:1..3", "int:log:16..256"),
        ("num-steps", "int:1.5..3", "whole numbers"),
        ("num-steps", "3", "one value is nothing to search"),
        ("num-steps", "1|1", "twice"),
        ("kind", "plain|other", "'other' is not plain or shifted"),
        ("kind", "0..1", "no number but plain or shifted"),
        ("bias", "int:0..1", "no number but bool"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(name, text, message):
    with pytest.raises(ValueError) as caught:
        parse(name, text)
    assert message in str(caught.value)
    assert f"--space.{name} {text}" in str(caught.value)  # which flag it was


def test_values_reach_nested_fields_and_leave_the_others():
    recipe = apply_values(
        Quadratic(), {"rate": 0.2, "outer.rate": 0.7, "loop.chunk_size": 5, "loop.task_chunk": 2}
    )
    expected = replace(Quadratic(), rate=0.2, outer=Outer(0.7))
    assert replace(recipe, loop=expected.loop) == expected
    assert (recipe.loop.chunk_size, recipe.loop.task_chunk) == (5, 2)
    assert recipe.loop.checkpoint_every == Quadratic().loop.checkpoint_every


def test_what_a_storage_cannot_hold_is_drawn_by_its_text():
    space = parse_space(Quadratic(), {"widths": "64,64|128", "bias": "true|false", "rate": "int:1..3"})
    assert space["widths"].drawn == ("64,64", "128")
    assert space["bias"].drawn == (True, False)
    values = drawn_values(space, {"widths": "64,64", "bias": False, "rate": 2})
    assert values == {"widths": (64, 64), "bias": False, "rate": 2.0}
    assert isinstance(values["rate"], float)


def test_distance_is_in_the_scale_of_each_range():
    space = parse_space(
        Quadratic(), {"rate": "log:1e-4..1", "num-steps": "int:0..10", "kind": "plain|shifted"}
    )
    here = {"rate": 1e-2, "num_steps": 5, "kind": "plain"}
    assert distance(space, here, here) == 0
    assert distance(space, here, here | {"rate": 1e-3}) == pytest.approx(0.25)
    assert distance(space, here, here | {"num_steps": 9}) == pytest.approx(0.4)
    assert distance(space, here, here | {"kind": "shifted"}) == 1
    assert distance(space, here, {"rate": 1.0, "num_steps": 10, "kind": "plain"}) == pytest.approx(0.5**0.5)


def test_the_grid_of_a_range_has_both_ends():
    assert parse("rate", "float:0..1").grid(3) == [0, 0.5, 1]
    assert parse("rate", "log:1e-2..1").grid(3) == pytest.approx([1e-2, 1e-1, 1])
    assert parse("rate", "float:0..1:0.25").grid(2) == [0, 0.25, 0.5, 0.75, 1]
    assert parse("num-steps", "int:1..4").grid(2) == [1, 2, 3, 4]
    assert parse("num-steps", "int:log:1..100").grid(3) == [1, 10, 100]


def test_the_space_is_taken_out_of_the_flags():
    words = ["--space.rate", "log:1e-3..1", "--seed", "3", "--space.outer.rate=0..1"]
    assert split_space(words) == ({"rate": "log:1e-3..1", "outer.rate": "0..1"}, ["--seed", "3"])
    for wrong in (["--space.rate"], ["--space.rate", "--seed"], ["--space.a=1..2", "--space.a=1..3"]):
        with pytest.raises(ValueError, match=r"space\.(a|rate)"):
            split_space(wrong)


def test_a_recipe_is_said_in_flags():
    recipe = replace(Quadratic(), num_steps=4, bias=False, widths=(2, 3), limit=5, outer=Outer(0.5))
    words = to_flags(recipe, Quadratic())
    assert " ".join(words) == "--num-steps 4 --widths 2 3 --limit 5 --no-bias --outer.rate 0.5"
    assert to_flags(Quadratic(), Quadratic()) == []
