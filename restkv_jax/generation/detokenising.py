"""The text of one row as its tokens come: whole characters, up to its end token or a stop string."""

import functools
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What bytes that are not a whole character are decoded to."""


class RowText:
    """The text of one row as its tokens come, up to its end token or a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.tokens: list[int] = []
        self.text = ""
        self.ended = False
        self._decoder = TokenDecoder(tokenizer)
        self._stop = StopStrings(stop)

    @property
    def leaves_out_last(self) -> bool:
        """Whether a stop string has cut off all of the last token."""
        return self._stop.found and len(self.text) <= len(self._decoder.whole(self.tokens[:-1]))

    def push(self, token: int, active: bool = True) -> str:
        """The text that is settled by a token, which ends the row if it is not `active` afterwards."""
        if self.ended:
            return ""
        self.tokens.append(token)
        if not active:
            return self.finish()
        return self._add(self._stop.push(self._decoder.push(token)))

    def finish(self) -> str:
        """What is still held back, once there are no more tokens."""
        self.ended = True
        return self._add(self._stop.push(self._decoder.finish()) + self._stop.finish())

    def _add(self, piece: str) -> str:
        self.ended |= self._stop.found
        self.text += piece
        return piece


class TokenDecoder:
    """Decodes tokens one by one into pieces that joined are what `tokenizer.decode` makes of all of them.

    That is without special tokens, and with the spaces as the tokens have them. Of the tokens, those since the last but
    one piece are decoded again, since decoders drop the space before a first word. Bytes that are not a whole
    character wait for the next token. `tokenizers.decoders.DecodeStream` does the same, but fails for good where a
    tokenizer with byte fallback gets bytes that are not a character after others that are; here the ones that were
    given stay.
    """

    def __init__(self, tokenizer: Any):
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._tokens: list[int] = []
        self._num_given = 0

    def whole(self, tokens: list[int]) -> str:
        """The text of tokens, all at once."""
        return self._decode(tokens)

    def push(self, token: int) -> str:
        """The text that is settled by a token."""
        self._tokens.append(token)
        text = self._new_text()
        return "" if text.endswith(REPLACEMENT) else self._give(text)

    def finish(self) -> str:
        """The bytes that wait for a next token."""
        return self._give(self._new_text())

    def _new_text(self) -> str:
        given = self._decode(self._tokens[: self._num_given])
        return self._decode(self._tokens)[len(given) :]

    def _give(self, text: str) -> str:
        if text:
            self._tokens, self._num_given = self._tokens[self._num_given :], len(self._tokens) - self._num_given
        return text


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    The first is the one that is whole first; of those that end with one character, the longest. So it does not matter
    in which pieces the text comes.
    """

    def __init__(self, stop: tuple[str, ...]):
        self.found = False
        self._stop = stop
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is settled by a piece; nothing once a stop string was found."""
        if self.found:
            return ""
        text = self._held + piece
        places = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        self.found = bool(places)
        settled = min(places)[1] if places else len(text) - self._beginning(text)
        self._held = "" if places else text[settled:]
        return text[:settled]

    def _beginning(self, text: str) -> int:
        """Characters at the end of the text that a stop string may begin with."""
        return max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)

    def finish(self) -> str:
        """What is held back."""
        held, self._held = self._held, ""
        return held


def check_stop(stop: Any) -> tuple[str, ...]:
    """Stop strings as a tuple.

    Raises:
      TypeError: something else than a str or a sequence of them.
      ValueError: an empty string.
    """
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, Sequence) or not all(isinstance(string, str) for string in stop):
        raise TypeError(f"stop={stop!r:.60} must be a string or a list of strings")
    if "" in stop:
        raise ValueError(f"stop={stop!r:.60} has an empty string, which would end every answer before it begins")
    return tuple(stop)
