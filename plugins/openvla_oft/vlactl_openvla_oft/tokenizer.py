"""Prompt text -> token ids: the checkpoint's own tokenizer, or a small list of words.

Both give ids that begin with `<s>` and end with the token of a lone blank, after which the model
predicts the first action token.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from vlactl.errors import IntegrityError
from vlactl_openvla_oft.architecture import BOS_ID

LLAMA_BLANK_ID = 29871
WORD_BLANK_ID = 3
UNKNOWN_ID = 0


class PromptTokenizer(Protocol):
    """What a prompt needs of a tokenizer."""

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a whole prompt."""


class LlamaTokenizer:
    """The `tokenizer.json` of a checkpoint directory."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise IntegrityError(
                f"{path} is missing", hint="a checkpoint directory must hold its tokenizer.json"
            )
        self._path = path
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise IntegrityError(f"{path} is damaged: {error}") from None

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a whole prompt."""
        ids: list[int] = self._tokenizer.encode(prompt).ids
        if ids[:1] != [BOS_ID] or ids[-1] != LLAMA_BLANK_ID:
            raise IntegrityError(
                f"{self._path} is not the Llama-2 tokenizer: a prompt must begin with token "
                f"{BOS_ID} and end with {LLAMA_BLANK_ID}, but became {ids}"
            )
        return ids


class WordTokenizer:
    """One token per word or sign of `words.txt`; a word's line is its id, others are unknown."""

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a whole prompt."""
        ids = word_ids()
        words = re.findall(r"\w+|[^\w\s]", prompt.lower())
        return [BOS_ID, *(ids.get(word, UNKNOWN_ID) for word in words), WORD_BLANK_ID]


@cache
def word_ids() -> dict[str, int]:
    """The shipped vocabulary. New words go to its end: ids are part of every trained policy."""
    text = resources.files(__package__).joinpath("words.txt").read_text(encoding="ascii")
    return {word: index for index, word in enumerate(text.splitlines())}
