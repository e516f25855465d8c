"""What every kernel is for, with the arrays that a model's programs hand it."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from restkv_jax.generation.reading import CHUNK_SIZE
from restkv_jax.kernels import scores
from restkv_jax.kernels.attention import part_gradients, read_parts
from restkv_jax.kernels.dispatch import Dispatched
from restkv_jax.kernels.distant import read_distant
from restkv_jax.kernels.paged import Pages, QuantisedPages, attend_pages, read_quantised_pages
from restkv_jax.kernels.pairs import Pairs, Queries, largest_divisor
from restkv_jax.kernels.quantised import Quantisation, QuantisedPairs, quantise
from restkv_jax.kernels.quantised_attention import read_quantised
from restkv_jax.kernels.softmax import empty_softmax
from restkv_jax.models.config import UNLIMITED, ModelConfig

PAGE_SIZE = 16
WINDOW = 32


class Use(NamedTuple):
    """A kernel in use.

    Attributes:
      purpose: what it is for.
      kernel: with all its implementations.
      make: its arrays, from a random key.
      options: static ones.
      operations: multiplications and additions of matrix products that it cannot do without.
      passes: how often it has to read the keys, and the values.
    """

    purpose: str
    kernel: Dispatched
    make: Callable[[Array], tuple[Any, ...]]
    options: dict[str, Any]
    operations: float
    passes: tuple[int, int] = (1, 1)

    def shapes(self) -> tuple[Any, ...]:
        """Those of the arrays."""
        return jax.eval_shape(lambda: self.make(jax.random.key(0)))

    def least_bytes(self) -> float:
        """Bytes that it has to move: its arrays, keys and values as often as it has to read them, and its result."""
        arrays = self.shapes()
        result = jax.eval_shape(lambda *xs: self.kernel.reference(*xs, **self.options), *arrays)
        pairs = [x for x in jax.tree.leaves(arrays, is_leaf=_is_pairs) if _is_pairs(x)]
        again = [(passes - 1) * _bytes(x) for p in pairs for passes, x in zip(self.passes, p[:2], strict=True)]
        return _bytes((arrays, result)) + sum(again)


def kernel_uses(config: ModelConfig, length: int, dtype: Any) -> Iterator[Use]:
    """Every kernel, for the last queries of one prompt.

    Args:
      config: the model's.
      length: tokens of the prompt.
      dtype: of queries, keys and values.
    """
    heads, dim = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // heads
    chunk, window = min(CHUNK_SIZE, length), min(WINDOW, length)

    def queries(key: Array, count: int) -> Queries:
        vectors = jax.random.normal(key, (1, heads, group, count, dim), dtype) * config.logit_scale
        positions = jnp.arange(length - count, length, dtype=jnp.int32)[None]
        options: Any = dict(soft_cap=config.attn_logit_softcapping, widest_window=config.widest_window)
        return Queries(vectors.astype(dtype), positions, jnp.int32(UNLIMITED), **options)

    def pairs(key: Array) -> Pairs:
        keys, values = jax.random.normal(key, (2, 1, heads, length, dim), dtype)
        return Pairs(keys, values, jnp.arange(length, dtype=jnp.int32)[None, None])

    def of_prompt(key: Array) -> tuple[Any, ...]:
        return queries(key, chunk), (pairs(key),)

    def of_gradient(key: Array) -> tuple[Any, ...]:
        shown = queries(key, chunk)
        sums = jnp.zeros(shown.vectors.shape[:-1], jnp.float32)
        return shown, (pairs(key),), sums, sums, shown.vectors

    def of_pages(key: Array) -> tuple[Any, ...]:
        held = -(-length // PAGE_SIZE)
        keys, values = jax.random.normal(key, (2, 1, 1, heads * held, PAGE_SIZE, dim), dtype)
        table = jnp.arange(heads * held, dtype=jnp.int32).reshape(1, heads, held)
        positions = jnp.broadcast_to(jnp.arange(held * PAGE_SIZE, dtype=jnp.int32), (heads, held * PAGE_SIZE))
        pages = Pages(
            keys, values, positions.reshape(1, 1, -1, PAGE_SIZE), table, jnp.full((1, heads), length, jnp.int32)
        )
        return queries(key, 1), pages

    quantisation = Quantisation("int8", largest_divisor(dim, 64))
    group_size, groups = quantisation.group_size, -(-length // quantisation.group_size)

    def quantised(key: Array, *axes: int) -> QuantisedPairs:
        keys, values = jax.random.normal(key, (2, *axes, groups * group_size, dim), dtype)
        return quantise(keys, values, quantisation)

    def of_quantised(key: Array) -> tuple[Any, ...]:
        positions = jnp.broadcast_to(jnp.arange(groups * group_size, dtype=jnp.int32), (1, heads, groups * group_size))
        return queries(key, 1), quantised(key, 1, 1, heads), jnp.int32(0), positions

    def of_quantised_pages(key: Array) -> tuple[Any, ...]:
        stored = jax.tree.map(lambda x: x.reshape(1, 1, heads * groups, *x.shape[3:]), quantised(key, 1, heads))
        positions = jnp.broadcast_to(jnp.arange(groups * group_size, dtype=jnp.int32), (heads, groups * group_size))
        table = jnp.arange(heads * groups, dtype=jnp.int32).reshape(1, heads, groups)
        lengths = jnp.full((1, heads), length, jnp.int32)
        return queries(key, 1), QuantisedPages(stored, positions.reshape(1, 1, -1, group_size), table, lengths)

    def of_distant(key: Array) -> tuple[Any, ...]:
        asked = queries(key, 1)
        keys, values = jax.random.normal(key, (2, 1, 1, heads, length, dim), dtype)
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (1, 1, 1, heads, length))
        rest = jnp.int32(0), jnp.arange(heads), jnp.array([length]), jnp.ones((1, heads), bool)
        return empty_softmax(asked.vectors), asked, keys[None], values, positions, *rest

    def of_scores(key: Array) -> tuple[Any, ...]:
        return queries(key, window), pairs(key)

    weights = jnp.full((1, window), 1 / window, jnp.float32)
    gram = jnp.broadcast_to(jnp.eye(dim, dtype=jnp.float32), (heads, group, dim, dim))
    product = 2.0 * heads * group * length * dim  # of one query of every head with all keys
    causal = product * chunk
    no_span = dict(spans=(None,))
    yield Use("attention of a prompt", read_parts, of_prompt, no_span, 2 * causal)
    yield Use("its gradient", part_gradients, of_gradient, no_span, 5 * causal)
    is_windowed = config.widest_window > 0
    yield Use("attention over pages", attend_pages, of_pages, dict(is_windowed=is_windowed), 2 * product)
    logits, forms = product * window, product * dim
    both = logits + forms
    by_query = logits + window * forms
    yield Use("over distant tokens", read_distant, of_distant, {}, 2 * product)
    yield Use("attention over int8", read_quantised, of_quantised, {}, 2 * product)
    yield Use(
        "over pages in int8", read_quantised_pages, of_quantised_pages, dict(is_windowed=is_windowed), 2 * product
    )
    for purpose, kernel, others, operations, passes, options in (
        ("scores of snapkv", scores.column_sums, (weights,), logits, (2, 0), {}),
        ("scores of laprox", scores.column_row_norms, (gram,), both, (2, 1), {}),
        ("scores of restkv", scores.averaged_attention_removal_error, (gram, weights), both, (2, 2), {}),
        ("scores of restkv by query", scores.averaged_removal_error, (gram, weights), by_query, (2, 2), {}),
        ("its window of neighbours", scores.attention_centres, (), logits, (2, 0), dict(count=min(992, length))),
    ):
        yield Use(purpose, kernel, lambda key, more=others: (*of_scores(key), *more), options, operations, passes)


def _is_pairs(x: Any) -> bool:
    return isinstance(x, Pairs)


def _bytes(tree: Any) -> float:
    return float(sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)))
