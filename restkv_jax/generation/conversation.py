"""Conversations: turn after turn is read onto one cache, which need never exceed its budget."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from restkv_jax.caches.base import Cache
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.generation.checks import CacheDType, check_cache_dtype, check_residual
from restkv_jax.generation.encoding import encode_messages, encode_next_turn, has_template
from restkv_jax.generation.passes import empty_cache
from restkv_jax.generation.text import TextStream, decode_text
from restkv_jax.models.decoder import Decoder
from restkv_jax.models.mesh import beside


class Conversation(NamedTuple):
    """What was said, and what the model holds of it. Nothing mutates: `Answer.conversation` is the next one.

    Attributes:
      messages: with "role" and "content" each, as in transformers; those before the first turn are yet to be read.
      cache: of one row; None before the first turn of a policy without budget.
      unread: tokens of the last answer that the cache does not hold yet. Of a stop string of several tokens, which no
        message has, the cache holds those before the last.
    """

    messages: tuple[Mapping[str, str], ...] = ()
    cache: Cache | None = None
    unread: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens read and generated so far."""
        return 0 if self.cache is None else int(self.cache.next_positions[0]) + len(self.unread)


def start_conversation(
    model: Decoder,
    params: Any,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 256,
    system: str | None = None,
    cache_dtype: CacheDType = None,
) -> Conversation:
    """A conversation in which nothing was said.

    With a budget its cache has all its slots from the start, so that it never grows and every turn runs the same
    programs.

    Args:
      model: a `Decoder`.
      params: its parameters.
      policy: that of the answers; a cache without budget grows.
      max_new_tokens: bound on the tokens of an answer, for which there are slots besides the budget.
      system: what the model is told before the first turn.
      cache_dtype: what keys and values are stored in; see `prefill`. Where the cache is without budget it is for
        `answer`.

    Raises:
      ValueError: a budget in percent, or a `cache_dtype` that does not go with model or budget.
    """
    quantisation = check_cache_dtype(cache_dtype, model)
    messages = () if system is None else ({"role": "system", "content": system},)
    if policy is None or policy.budget is None:
        return Conversation(messages)
    if isinstance(policy.budget, str):
        raise ValueError(
            f"budget={policy.budget!r} is a percentage of one prompt; give a conversation a number of slots"
        )
    check_residual(quantisation, (policy,), model.sharing)
    with beside(params) as placed:
        cache = empty_cache(model, placed["embedding"].dtype, policy, None, max_new_tokens, 1, quantisation)
    return Conversation(messages, cache)


class Answer:
    """The next answer of a conversation: iterating gives its text as it comes, in whole characters.

    `end()` ends it after the piece that was given last, from a signal handler too. Once the iteration is over,
    `conversation` is the next one and `text` the whole answer.
    """

    def __init__(self, conversation: Conversation, question: str, stream: TextStream):
        self.conversation = conversation
        self.text = ""
        self._question = question
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        for (piece,) in self._stream:
            yield piece
        (row,), last = self._stream.rows, self._stream.last
        assert last is not None
        self.text = row.text
        said = {"role": "user", "content": self._question}, {"role": "assistant", "content": row.text}
        said_tokens = row.tokens[:-1] if row.leaves_out_last else row.tokens
        chosen = said_tokens[int(last.lengths[0]) - 1 :]  # not fed yet, and said: none if the end came in between
        unread = tuple(token for token in chosen if token not in self._stream.ends)
        self.conversation = Conversation((*self.conversation.messages, *said), last.cache, unread)

    def end(self) -> None:
        """Ends the answer where it is."""
        self._stream.rows[0].ended = True


def answer(
    model: Decoder,
    params: Any,
    tokenizer: Any,
    conversation: Conversation,
    question: str,
    policy: EvictionPolicy | None = None,
    max_new_tokens: int = 256,
    *,
    eos_token_ids: tuple[int, ...] | None = None,
    **options: Any,
) -> Answer:
    """Answers the user's next turn, in the tokenizer's chat template.

    Only what is new is read: the end of the last answer and the turn. With a policy, what is held and what is new is
    then judged together, and the cache comes back within the budget.

    Args:
      model: a `Decoder`.
      params: its parameters.
      tokenizer: a tokenizer of `transformers` with a chat template.
      conversation: so far; it stays as it is and may be answered again.
      question: the user's turn.
      policy: what to keep; everything by default.
      max_new_tokens: upper bound on the tokens of the answer.
      eos_token_ids: tokens that end the answer; the model's own by default.
      options: `stop`, `chunk_size`, `cache_dtype`, and of drawing: `key`, `temperature`, `top_k`, `top_p`, `min_p`; see
        `generate_text`.

    Raises:
      ValueError, TypeError: arguments that make no sense, each named.
    """
    if not has_template(tokenizer):
        raise ValueError(
            "the tokenizer has no chat template, which a conversation needs; restkv_jax.extend reads texts"
        )
    tokens = [*conversation.unread, *_turn_tokens(tokenizer, conversation, question)]
    stream = decode_text(
        model,
        params,
        tokenizer,
        jnp.asarray([tokens], jnp.int32),
        None,
        policy,
        max_new_tokens,
        cache=conversation.cache,
        eos_token_ids=eos_token_ids,
        **options,
    )
    return Answer(conversation, question, stream)


def _turn_tokens(tokenizer: Any, conversation: Conversation, question: str) -> list[int]:
    if conversation.num_tokens:
        return encode_next_turn(tokenizer, conversation.messages, question)
    return encode_messages(tokenizer, [*conversation.messages, {"role": "user", "content": question}])
