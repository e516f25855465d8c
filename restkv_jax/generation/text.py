"""Text in and out: prompts are encoded, and answers decoded as their tokens come."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax import Array
from jax.typing import ArrayLike

from restkv_jax.caches.base import Cache
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.checks import CacheDType, check_eos
from restkv_jax.generation.decoding import Decoding
from restkv_jax.generation.detokenising import RowText, check_stop
from restkv_jax.generation.encoding import encode_prompts, is_one_prompt
from restkv_jax.generation.generating import Steps, decode_prompt, make_sampling
from restkv_jax.generation.reading import CHUNK_SIZE, check_and_pad
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.key_groups import Sharing
from restkv_jax.models.rules import with_usual_promotion


@with_usual_promotion
def generate_text(
    model: Decoder,
    params: Any,
    tokenizer: Any,
    prompts: Any,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
    *,
    stop: str | Sequence[str] = (),
    key: Array | None = None,
    temperature: Array | float | None = None,
    top_k: Array | int | None = None,
    top_p: Array | float | None = None,
    min_p: Array | float | None = None,
    eos_token_ids: tuple[int, ...] | None = None,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
    cache: Cache | None = None,
    segment_size: int | None = None,
    cache_dtype: CacheDType = None,
) -> Any:
    """Answers prompts, texts or conversations, on a small cache.

    A text is read as it is and continued; messages stand in the tokenizer's chat template and are answered. The loop
    runs on the host, one compiled step per token.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokenizer: a tokenizer of `transformers`, as `load_model` returns it.
      prompts: a text; a conversation, a list of messages such as `{"role": "user", "content": "Hello"}`; or a list of
        texts and conversations, which are read as one batch.
      policy: what to keep of the prompts; everything by default.
      max_new_tokens: upper bound on the tokens of an answer.
      stop: strings that end an answer; it ends before the first of them. Special tokens end it as `eos_token_ids` do.
      key: a JAX random key, folded with the prompt's index, or keys [B]; None decodes greedily.
      temperature: divides the logits; 1 by default.
      top_k: draw among the `k` best tokens.
      top_p: draw among the best tokens that hold this probability mass.
      min_p: draw among the tokens that are at least this times as probable as the best.
      eos_token_ids: tokens that end an answer and are not part of its text; the model's own by default.
      chunk_size: bound on the prompt tokens whose activations exist at one time.
      sharing: whose keys each layer reads distant tokens by; see `prefill`.
      cache: what was read before, of as many rows as there are prompts, which go on from it; see `extend`. Texts are
        then encoded without the tokens that the tokenizer puts before every text.
      segment_size: reads the prompts in segments; see `prefill`.
      cache_dtype: what keys and values are stored in, as they are by default; see `prefill`.

    Returns:
      the answer, a str, to one prompt; a list of answers to a list of prompts.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    texts = decode_text(
        model,
        params,
        tokenizer,
        *encode_prompts(tokenizer, prompts, goes_on=cache is not None),
        policy,
        max_new_tokens,
        stop=stop,
        chunk_size=chunk_size,
        sharing=sharing,
        cache=cache,
        segment_size=segment_size,
        cache_dtype=cache_dtype,
        key=key,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        eos_token_ids=eos_token_ids,
    )
    for _ in texts:
        pass
    answers = [row.text for row in texts.rows]
    return answers[0] if is_one_prompt(prompts) else answers


@with_usual_promotion
def stream_text(
    model: Decoder,
    params: Any,
    tokenizer: Any,
    prompts: Any,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 64,
    *,
    stop: str | Sequence[str] = (),
    key: Array | None = None,
    temperature: Array | float | None = None,
    top_k: Array | int | None = None,
    top_p: Array | float | None = None,
    min_p: Array | float | None = None,
    eos_token_ids: tuple[int, ...] | None = None,
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
    cache: Cache | None = None,
    segment_size: int | None = None,
    cache_dtype: CacheDType = None,
) -> Iterator[Any]:
    """Yields answers as they come, in pieces that joined are those of `generate_text`.

    Arguments as for `generate_text`, checked at the call. A piece is whole characters: one that is spread over several
    tokens comes with the last of them, and text that may be the beginning of a stop string once that is decided.

    Returns:
      an iterator over the pieces of the answer, each a str, to one prompt; for a list of prompts, over lists of the new
      piece of each, "" where there is none.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    texts = decode_text(
        model,
        params,
        tokenizer,
        *encode_prompts(tokenizer, prompts, goes_on=cache is not None),
        policy,
        max_new_tokens,
        stop=stop,
        chunk_size=chunk_size,
        sharing=sharing,
        cache=cache,
        segment_size=segment_size,
        cache_dtype=cache_dtype,
        key=key,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        eos_token_ids=eos_token_ids,
    )
    new = (pieces for pieces in texts if any(pieces))
    return (pieces[0] for pieces in new) if is_one_prompt(prompts) else new


def decode_text(
    model: Decoder,
    params: Any,
    tokenizer: Any,
    tokens: ArrayLike,
    mask: ArrayLike | None,
    policy: EvictionPolicy | None,
    max_new_tokens: int,
    *,
    stop: str | Sequence[str] = (),
    chunk_size: int = CHUNK_SIZE,
    sharing: Sharing | None = None,
    cache: Cache | None = None,
    segment_size: int | None = None,
    cache_dtype: CacheDType = None,
    **sampling: Any,
) -> "TextStream":
    """The text that follows encoded prompts, decoded as it is iterated over.

    Arguments as for `generate_text`, checked at the call; `tokens` and `mask` as for `generate`.
    """
    stop = check_stop(stop)
    ends = (*check_eos(model, sampling.get("eos_token_ids")), *_special(tokenizer, stop, model.config.vocab_size))
    options = max_new_tokens, chunk_size, sharing, cache, segment_size, cache_dtype
    prompt = check_and_pad(model, params, tokens, mask, (policy,), *options)
    batch = prompt.tokens.shape[0]
    states = decode_prompt(prompt, params, make_sampling(model, batch, **sampling | {"eos_token_ids": ends}))
    return TextStream(states, [RowText(tokenizer, stop) for _ in range(batch)], ends)


def _special(tokenizer: Any, stop: tuple[str, ...], vocab_size: int) -> list[int]:
    """The ids of stop strings that are special tokens, which a text is without."""
    known = tokenizer.added_tokens_decoder if stop else {}
    return [id_ for id_, token in known.items() if token.special and token.content in stop and id_ < vocab_size]


class TextStream:
    """Text as it is decoded: iterating gives for every step a list of the new piece of each row.

    `rows` hold tokens and text so far; `row.ended = True` ends a row before the next step. `last`, once the iteration
    is over, is the final state: its cache holds each row's tokens without the last, which was not fed back. `ends` are
    the tokens that end a row.
    """

    def __init__(self, states: Steps, rows: Sequence[RowText], ends: tuple[int, ...]):
        self.rows = rows
        self.ends = ends
        self.last: Decoding | None = None
        self._states = states

    def __iter__(self) -> Iterator[list[str]]:
        now: Decoding | None = next(self._states)
        while now is not None:
            tokens, active = (np.array(x).tolist() for x in (now.token, now.active))
            yield [row.push(*new) for row, *new in zip(self.rows, tokens, active, strict=True)]
            now = self._step(active)
        rest = [row.finish() for row in self.rows]
        if any(rest):
            yield rest

    def _step(self, active: list[bool]) -> Decoding | None:
        going = [not row.ended for row in self.rows]
        try:
            return self._states.send(None if going == active else np.array(going))
        except StopIteration as end:
            self.last = end.value
            return None
