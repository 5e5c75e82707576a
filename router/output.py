"""One choice's output: tokens in as workers send them, text out with stop strings applied. Pure.

Tokens are placed by output index: what was seen before is dropped (a resumed or repeated attempt), a hole is an error.
Text may lag behind tokens: half a character waits for its rest, and the longest end of the text that could still become
a stop string waits until it has or cannot. Whether a stop string is found does not depend on how the text is cut into
tokens or tokens into pushes: the first one to be complete ends the choice, the longest of those that end together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..cluster.types import FinishReason, SampledToken
from .detokenizer import Detokenizer
from .tokenizer_base import Tokenizer


class OutputGap(RuntimeError):
    """A worker's tokens begin beyond the next output index: some were lost on the way, the attempt cannot go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputChunk:
    """What one push adds to the client's stream. The last chunk of a choice has `finish_reason`."""

    text: str = ""
    tokens: tuple[SampledToken, ...] = ()
    """New tokens, each exactly once; the token that ends the choice is among them though it may have no text."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id; None for end of sequence and for length."""


_NOTHING = OutputChunk()


class OutputStream:
    """The stream of one choice. `push` is called for every event of a worker, in order of arrival."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special: bool = True,
        continuation: bool = False,
    ) -> None:
        """`stop`: stop strings, cut from the text with all that follows. `min_tokens`: one that is complete before so
        many output tokens exist is text. `continuation`: see `Detokenizer`. Raises ValueError for an empty string.
        """
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, skip_special, continuation=continuation)
        self._stops = StopStrings(stop)
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._stop_reason: str | int | None = None

    @property
    def finished(self) -> bool:
        """Whether the last chunk was given; what comes later is dropped."""
        return self._finish_reason is not None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        return self._stop_reason

    @property
    def output_tokens(self) -> int:
        """Tokens so far, the one that ended the choice included: usage, and the next index to come."""
        return len(self._token_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All output tokens so far, to resume from on another worker."""
        return tuple(self._token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """For logprobs."""
        return self._tokenizer.token_bytes(token_id)

    def push(
        self, index: int, tokens: Sequence[SampledToken], finish: FinishReason | None, stop_token_id: int | None
    ) -> OutputChunk:
        """Takes `tokens`, the first of which has output index `index`; `finish` ends the choice after the last.

        With `FinishReason.STOP` the last token is the end of sequence or `stop_token_id` and gives no text. A chunk may
        hold fewer tokens than were pushed: those after a stop string never were. Raises `OutputGap`.
        """
        if self.finished:
            return _NOTHING
        seen = self.output_tokens - index
        if seen < 0:
            raise OutputGap(f"output index {index} came, {self.output_tokens} is next: {-seen} tokens are missing")
        if seen > len(tokens):
            return _NOTHING  # an old event, with an old finish if any
        fresh = tokens[seen:]
        texts: list[str] = []
        for position, token in enumerate(fresh, start=1):
            self._token_ids.append(token.token_id)
            if finish is FinishReason.STOP and position == len(fresh):
                break
            if self._take(self._detokenizer.push(token.token_id), texts):
                return self._chunk(texts, fresh[:position])
        if finish is not None and not self._take(self._detokenizer.flush(), texts):
            texts.append(self._stops.release())
            self._finish_reason, self._stop_reason = finish, stop_token_id
        return self._chunk(texts, fresh)

    def _take(self, text: str, texts: list[str]) -> bool:
        """Appends what may be shown of `text` to `texts`; True if a stop string ended the choice."""
        shown, stop = self._stops.push(text, armed=self.output_tokens >= self._min_tokens)
        texts.append(shown)
        if stop is None:
            return False
        self._finish_reason, self._stop_reason = FinishReason.STOP, stop
        return True

    def _chunk(self, texts: list[str], tokens: Sequence[SampledToken]) -> OutputChunk:
        return OutputChunk(
            text="".join(texts),
            tokens=tuple(tokens),
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
        )


class StopStrings:
    """Looks for several strings at once in a text that comes in pieces, and holds back what may be the start of one.

    For each string a Knuth-Morris-Pratt automaton, whose state is the length of the longest end of the text that begins
    the string: the held-back text is the longest of those. Constant amortised work per character and string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise ValueError("stop: an empty string would end every answer at once")
        self._strings = tuple(dict.fromkeys(strings))
        self._firsts = frozenset(string[0] for string in self._strings)
        self._borders = tuple(_borders(string) for string in self._strings)
        self._states = [0] * len(self._strings)
        self._held = ""

    def push(self, text: str, *, armed: bool) -> tuple[str, str | None]:
        """(text that may be shown, the stop string found or None); after one is found there is no more to push.

        Not `armed`: a string that becomes complete in this piece counts as text; one that only begins does not.
        """
        if not self._held and self._firsts.isdisjoint(text):
            return text, None
        buffer = self._held + text
        for end in range(len(self._held) + 1, len(buffer) + 1):
            found = self._advance(buffer[end - 1])
            if found is not None and armed:
                self._held = ""
                return buffer[: end - len(found)], found
        shown_chars = len(buffer) - max(self._states)
        self._held = buffer[shown_chars:]
        return buffer[:shown_chars], None

    def release(self) -> str:
        """The held-back text: nothing follows that could make it a stop string."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._strings)
        return held

    def _advance(self, char: str) -> str | None:
        """Moves every automaton by one character; the longest string that ends here."""
        found: str | None = None
        for i, string in enumerate(self._strings):
            state, borders = self._states[i], self._borders[i]
            while state and string[state] != char:
                state = borders[state - 1]
            if string[state] == char:
                state += 1
            if state == len(string):
                if found is None or len(string) > len(found):
                    found = string
                state = borders[state - 1]
            self._states[i] = state
        return found


def _borders(string: str) -> tuple[int, ...]:
    """For each prefix, the length of its longest proper prefix that is also its end (Knuth, Morris, Pratt 1977)."""
    borders = [0] * len(string)
    length = 0
    for i in range(1, len(string)):
        while length and string[i] != string[length]:
            length = borders[length - 1]
        if string[i] == string[length]:
            length += 1
        borders[i] = length
    return tuple(borders)
