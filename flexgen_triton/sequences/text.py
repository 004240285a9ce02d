"""Text from tokens as they come, and the stop strings in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of the first bytes of a character


class TextStream:
    """The text of one completion while its tokens come.

    `decode` turns token ids into text. Only the last few tokens are decoded anew with each one, so a completion costs
    its length, not its square. Stop strings count once `min_tokens` tokens have come.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._decode, self._stop, self._min_tokens = decode, stop, min_tokens
        self._ids: list[int] = []
        self._start = 0  # tokens from here on are decoded: enough for the text of the next one to be told
        self._read = 0  # tokens whose text is in `text`
        self.text = ""
        self.stopped_at: int | None = None  # where in the text the stop string begins

    def add(self, token: int) -> str | None:
        """Take one more token; returns the stop string that the text now holds, the earliest one."""
        self._ids.append(token)
        before, after = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if len(after) <= len(before) or after.endswith(UNFINISHED):
            return None
        new = after[len(before) :]
        self._start, self._read = self._read, len(self._ids)
        self.text += new
        return self._find(len(new)) if len(self._ids) >= self._min_tokens else None

    def _find(self, new: int) -> str | None:
        """The earliest stop string that ends in the last `new` characters."""
        found = []
        for stop in self._stop:
            at = self.text.find(stop, max(len(self.text) - new - len(stop) + 1, 0))
            if at >= 0:
                found.append((at, stop))
        if not found:
            return None
        self.stopped_at, stop = min(found)
        return stop
