"""English words that prompts are made of, from the package `wonderwords`."""

import functools
import importlib.resources


@functools.cache
def adjectives() -> tuple[str, ...]:
    """The adjectives of `wonderwords`."""
    return _words("ADJECTIVES")


@functools.cache
def nouns() -> tuple[str, ...]:
    """The nouns of `wonderwords`."""
    return _words("NOUNS")


@functools.cache
def plain_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs of small letters alone, each once."""
    words = {*nouns(), *adjectives(), *_words("VERBS")}
    return tuple(sorted(word for word in words if word.isalpha() and word.islower()))


def _words(category: str) -> tuple[str, ...]:
    """A default list of `wonderwords`, such as NOUNS, in its order."""
    try:
        from wonderwords import Defaults, assets
    except ImportError as error:
        raise ImportError("prompts need the package `wonderwords`: install restkv-jax[eval]") from error
    lines = (importlib.resources.files(assets) / Defaults[category].value).read_text("utf-8").splitlines()
    return tuple(line.rstrip() for line in lines if line.strip())
