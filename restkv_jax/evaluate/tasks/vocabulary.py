"""English words that prompts are made of, from the package `wonderwords`."""

import functools


@functools.cache
def adjectives() -> tuple[str, ...]:
    """The adjectives of `wonderwords`."""
    return _words("adjectivelist.txt")


@functools.cache
def nouns() -> tuple[str, ...]:
    """The nouns of `wonderwords`."""
    return _words("nounlist.txt")


@functools.cache
def plain_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs of small letters alone, each once."""
    words = {*nouns(), *adjectives(), *_words("verblist.txt")}
    return tuple(sorted(word for word in words if word.isalpha() and word.islower()))


def _words(file: str) -> tuple[str, ...]:
    try:
        from wonderwords.random_word import _get_words_from_text_file
    except ImportError as error:
        raise ImportError("prompts need the package `wonderwords`: install restkv-jax[eval]") from error
    return tuple(word for word in _get_words_from_text_file(file) if word)
