"""A request's parameters are checked once, when it is made, and an error names field and value."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from flexgen_triton.sequences.params import MAX_LOGPROBS, SamplingParams

WHOLE = ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")
REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
OPTIONAL = ("seed", "logprobs", "prompt_logprobs")


def error(**fields: object) -> str:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**fields)
    message = str(caught.value)
    assert "\n" not in message and ". " not in message, "more than a sentence"
    return message


@pytest.mark.parametrize("value", [True, "3", 2.0, math.nan, [1]], ids=repr)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name, value):
    assert error(**{name: value}) == f"{name} is {value!r}; it must be a whole number"


@pytest.mark.parametrize("name", [n for n in WHOLE if n not in OPTIONAL])
def test_numbers_that_may_not_be_left_out(name):
    assert error(**{name: None}) == f"{name} is None; it must be a whole number"


@pytest.mark.parametrize("value", [False, "1", None, math.nan, math.inf, -math.inf, 10**400], ids=lambda v: repr(v)[:9])
@pytest.mark.parametrize("name", REAL)
def test_finite_numbers(name, value):
    assert error(**{name: value}) == f"{name} is {value!r}; it must be a finite number"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("n", 0, "between 1 and 1024"),
        ("n", 1025, "between 1 and 1024"),
        ("max_tokens", 0, "at least 1"),
        ("min_tokens", -1, "at least 0"),
        ("top_k", -2, "at least -1"),
        ("seed", 1 << 64, f"between {-(1 << 63)} and {(1 << 64) - 1}"),
        ("seed", -(1 << 63) - 1, f"between {-(1 << 63)} and {(1 << 64) - 1}"),
        ("seed", 10**400, f"between {-(1 << 63)} and {(1 << 64) - 1}"),
        ("logprobs", -1, "between 0 and 100"),
        ("prompt_logprobs", MAX_LOGPROBS + 1, "between 0 and 100"),
        ("temperature", -0.1, "at least 0"),
        ("top_p", 1.1, "between 0 and 1"),
        ("top_p", 0, "above 0"),
        ("min_p", -0.5, "between 0 and 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", -1, "at least 0"),
        ("presence_penalty", 2.5, "between -2 and 2"),
        ("frequency_penalty", -3, "between -2 and 2"),
    ],
    ids=lambda v: str(v)[:12],
)
def test_ranges(name, value, allowed):
    message = error(**{name: value})
    assert message.startswith(f"{name} is ") and message.endswith(f"; it must be {allowed}")
    assert str(value) in message or value == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": -(1 << 63)},
        {"seed": (1 << 64) - 1},
        {"seed": None, "logprobs": None, "prompt_logprobs": None},
        {"logprobs": 0, "prompt_logprobs": MAX_LOGPROBS},
        {"top_k": -1},
        {"top_k": 1 << 70, "max_tokens": 1 << 70},
        {"temperature": 0, "top_p": 1, "min_p": 1, "repetition_penalty": 2},
        {"presence_penalty": -2, "frequency_penalty": 2.0},
        {"min_tokens": 16, "max_tokens": 16},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_taken(fields):
    assert all(getattr(SamplingParams(**fields), name) == value for name, value in fields.items())


def test_min_tokens_above_max_tokens():
    assert error(min_tokens=5, max_tokens=4) == "min_tokens is 5 and max_tokens 4; it may not be above it"


@pytest.mark.parametrize(
    ("stop", "texts"),
    [("\n", ("\n",)), (["a", "b"], ("a", "b")), ((), ()), ([], ()), (None, ()), (iter(["ab"]), ("ab",))],
    ids=["text", "list", "empty", "empty list", "none", "iterator"],
)
def test_stop_becomes_a_tuple_of_texts(stop, texts):
    assert SamplingParams(stop=stop).stop == texts


@pytest.mark.parametrize(
    ("ids", "tokens"), [([3, 1], (3, 1)), (range(2), (0, 1)), (None, ()), ((), ())], ids=["list", "range", "none", "-"]
)
def test_stop_token_ids_become_a_tuple(ids, tokens):
    assert SamplingParams(stop_token_ids=ids).stop_token_ids == tokens


@pytest.mark.parametrize("make", [np.int64, np.int8, np.uint16], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", [*WHOLE, *REAL])
def test_numpys_numbers_are_pythons(name, make):
    """Equal parameters are equal, hash alike and print alike, whatever numbers they were made of."""
    made, plain = SamplingParams(**{name: make(1)}), SamplingParams(**{name: 1})
    assert (made, hash(made)) == (plain, hash(plain))
    assert type(getattr(made, name)) in (int, float) and "np." not in repr(made)


@pytest.mark.parametrize("make", [np.float64, np.float32, np.float16], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", REAL)
def test_so_are_its_fractions(name, make):
    made, plain = SamplingParams(**{name: make(0.5)}), SamplingParams(**{name: 0.5})
    assert (made, hash(made)) == (plain, hash(plain)) and type(getattr(made, name)) is float


@pytest.mark.parametrize("value", [np.float64(2), np.bool_(True), np.array([1]), np.str_("1")], ids=repr)
@pytest.mark.parametrize("name", WHOLE)
def test_but_not_what_is_no_whole_number(name, value):
    assert error(**{name: value}) == f"{name} is {value!r}; it must be a whole number"


@pytest.mark.parametrize("value", [np.float32(np.nan), np.float16(np.inf), np.bool_(False)], ids=repr)
@pytest.mark.parametrize("name", REAL)
def test_nor_what_is_not_finite(name, value):
    assert error(**{name: value}) == f"{name} is {value!r}; it must be a finite number"


@pytest.mark.parametrize("value", ["no", 0, 1, None, 1.0], ids=repr)
@pytest.mark.parametrize("name", ["ignore_eos", "skip_special_tokens", "include_stop_str_in_output"])
def test_yes_or_no(name, value):
    assert error(**{name: value}) == f"{name} is {value!r}; it must be True or False"
    assert getattr(SamplingParams(**{name: np.bool_(False)}), name) is False


def test_stops_may_be_arrays():
    assert SamplingParams(stop_token_ids=np.array([3, 1])).stop_token_ids == (3, 1)
    assert SamplingParams(stop_token_ids=np.array([], dtype=np.int64)) == SamplingParams()
    assert SamplingParams(stop=np.array(["a", "b"])).stop == ("a", "b")


@pytest.mark.parametrize("ids", [b"ab", {1: 2}, np.array([1.0]), np.array([True]), np.array([[1]])], ids=repr)
def test_bytes_and_the_like_are_no_stop_token_ids(ids):
    assert error(stop_token_ids=ids).startswith(f"stop_token_ids is {ids!r}; it must be ")


@pytest.mark.parametrize("stop", ["", ["a", ""], [1], [None], b"ab", 0, 5, True], ids=repr)
def test_stops_that_are_not_texts(stop):
    assert error(stop=stop).startswith(f"stop is {stop!r}; it must be a")


@pytest.mark.parametrize("ids", [[True], [-1], [1.0], ["1"], "12", 0, 7, [None]], ids=repr)
def test_stop_token_ids_that_are_not_token_ids(ids):
    assert error(stop_token_ids=ids).startswith(f"stop_token_ids is {ids!r}; it must be ")


def test_what_was_given_cannot_change_it_afterwards():
    stops, ids = ["a"], [1]
    params = SamplingParams(stop=stops, stop_token_ids=ids)
    stops.append("b")
    ids.append(2)
    assert params == SamplingParams(stop="a", stop_token_ids=(1,))
    assert hash(params) == hash(SamplingParams(stop="a", stop_token_ids=(1,)))
    with pytest.raises(FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0, True), (0.0, True), (9e-6, True), (1e-5, False), (1, False)], ids=str
)
def test_which_temperatures_are_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).is_greedy is greedy
