"""The decode loop: a token is chosen from the logits and fed to the cache, and the next logits come."""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.caches.base import Cache
from restkv_jax.generation.passes import append
from restkv_jax.models.decoder import Decoder


class Chooser(Protocol):
    """How tokens are chosen, a pytree: `Sampling`, or `Forced` for tokens that are given.

    Rows that have ended go on with `pad_token_id`.
    """

    @property
    def pad_token_id(self) -> Array | int: ...

    def choose(self, logits: Array, step: Array) -> tuple[Array, Any]:
        """The next token of each row, int32 [B], and what to note of it, arrays [B, ...] or None.

        Args:
          logits: float32 [B, V].
          step: int32 scalar, which token it is, from 0.
        """
        ...

    def ends(self, token: Array) -> Array:
        """Which rows end with their token, bool [B]."""
        ...


class Decoding(NamedTuple):
    """Between two steps: the newest token is chosen and not yet fed.

    `token` int32 [B]; `note`, of the chooser; `active` bool [B], rows that go on; `lengths` int32 [B], tokens of each
    row so far; `step` int32 scalar, how many steps there were; `cache`.
    """

    token: Array
    note: Any
    active: Array
    lengths: Array
    step: Array
    cache: Cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def feed(model: Decoder, params: Any, token: Array, cache: Cache, active: Array) -> tuple[Array, Cache]:
    """Feeds one token per row: the next logits, float32 [B, V], and the cache; rows not `active` stay as they are."""
    return append(model, params, token[:, None], active[:, None], cache)


def begin(logits: Array, cache: Cache, chooser: Chooser) -> Decoding:
    """The state after the first token, from a prefill's logits and cache."""
    batch = logits.shape[0]
    active, lengths = jnp.ones(batch, bool), jnp.zeros(batch, jnp.int32)
    return _choose(logits, active, lengths, jnp.int32(0), cache, chooser)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="now")
def advance(model: Decoder, params: Any, now: Decoding, chooser: Chooser) -> Decoding:
    """One step: the newest tokens are fed and the next ones chosen."""
    logits, cache = feed(model, params, now.token, now.cache, now.active)
    return _choose(logits, now.active, now.lengths, now.step, cache, chooser)


def _choose(logits: Array, active: Array, lengths: Array, step: Array, cache: Cache, chooser: Chooser) -> Decoding:
    chosen, note = chooser.choose(logits, step)
    token = jnp.where(active, chosen, chooser.pad_token_id)
    return Decoding(token, note, active & ~chooser.ends(chosen), lengths + active, step + 1, cache)


class Decoded(NamedTuple):
    """What `run` returns: `tokens` int32 [B, N], `notes` of the chooser [B, N, ...], and the last state."""

    tokens: Array
    notes: Any
    now: Decoding


@functools.partial(jax.jit, static_argnames=("model", "count"), donate_argnames="now")
def run(model: Decoder, params: Any, now: Decoding, chooser: Chooser, count: int) -> Decoded:
    """Decodes `count` tokens more, or until all rows have ended; what is left is padding."""
    batch = now.token.shape[0]
    tokens = jnp.full((batch, count), chooser.pad_token_id, jnp.int32)
    notes = jax.tree.map(lambda x: jnp.zeros((batch, count, *x.shape[1:]), x.dtype), now.note)
    if count == 0:  # nothing can be written into no tokens
        return Decoded(tokens, notes, now)

    def is_unfinished(carry: tuple[Array, Decoded]) -> Array:
        done, decoded = carry
        return (done < count) & decoded.now.active.any()

    def step(carry: tuple[Array, Decoded]) -> tuple[Array, Decoded]:
        done, (tokens, notes, now) = carry
        now = advance(model, params, now, chooser)
        notes = jax.tree.map(lambda whole, new: whole.at[:, done].set(new), notes, now.note)
        return done + 1, Decoded(tokens.at[:, done].set(now.token), notes, now)

    return jax.lax.while_loop(is_unfinished, step, (jnp.int32(0), Decoded(tokens, notes, now)))[1]


@functools.partial(jax.jit, static_argnames=("model", "count"), donate_argnames="cache")
def run_from(model: Decoder, params: Any, logits: Array, cache: Cache, chooser: Chooser, count: int) -> Decoded:
    """Decodes `count` tokens from a prefill's logits and cache."""
    now = begin(logits, cache, chooser)
    tokens, notes, last = run(model, params, now, chooser, count - 1)

    def behind_first(first: Array, others: Array) -> Array:
        return jnp.concatenate([first[:, None], others], axis=1)

    return Decoded(behind_first(now.token, tokens), jax.tree.map(behind_first, now.note, notes), last)
