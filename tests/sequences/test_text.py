"""Text that grows token by token is the text of all tokens, and stop strings are found as soon as they are there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_triton.sequences.text import TextStream


def decode(ids):
    """Bytes as token ids, as a byte-level tokenizer has them."""
    return bytes(ids).decode(errors="replace")


def fed(text: str, stop: tuple[str, ...] = (), min_tokens: int = 0) -> tuple[TextStream, str | None, int]:
    """Feed a text's bytes until a stop string is found: the stream, that string and the tokens it took."""
    stream = TextStream(decode, stop, min_tokens)
    data = text.encode()
    for n, byte in enumerate(data, 1):
        found = stream.add(byte)
        if found is not None:
            return stream, found, n
    return stream, None, len(data)


@given(st.text(max_size=60))
def test_the_pieces_make_the_whole(text):
    assert fed(text)[0].text == text


def test_half_a_character_is_no_text_yet():
    stream = TextStream(decode)
    first, second = "é".encode()
    stream.add(first)
    assert stream.text == ""
    stream.add(second)
    assert stream.text == "é"


@given(text=st.text("ab\u00e9", max_size=40), stop=st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_found_where_the_text_has_them(text, stop):
    stream, found, _ = fed(text, tuple(stop))
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert (found is not None) == bool(ends)
    if found is not None:
        assert len(stream.text) == min(ends), "as soon as it is there"
        assert stream.stopped_at is not None
        assert stream.text[stream.stopped_at :] == found
        assert stream.stopped_at == min(text[: min(ends)].find(s) for s in stop if s in text[: min(ends)])


@pytest.mark.parametrize(("min_tokens", "tokens"), [(0, 2), (2, 2), (3, 5)])
def test_stop_strings_count_from_min_tokens_on(min_tokens, tokens):
    assert fed("abxab", ("ab",), min_tokens)[1:] == ("ab", tokens)
