"""Which kind of cache a model and a policy need: the only place that knows all kinds."""

from restkv_jax.caches.base import Keeper
from restkv_jax.caches.candidates import PagedKeeper
from restkv_jax.caches.dense import DenseKeeper
from restkv_jax.caches.evicting import EvictingKeeper
from restkv_jax.caches.quantised import QuantisedKeeper
from restkv_jax.caches.quantised_evicting import QuantisedEvictingKeeper
from restkv_jax.caches.quantised_paged import QuantisedPagedKeeper
from restkv_jax.caches.quantised_shared import QuantisedSharedKeeper
from restkv_jax.caches.shared_keeper import SharedKeeper
from restkv_jax.eviction.policy import EvictionPolicy
from restkv_jax.kernels.quantised import Quantisation
from restkv_jax.models.decoder import Decoder

KEEPERS: list[type[Keeper]] = [SharedKeeper, EvictingKeeper, PagedKeeper, DenseKeeper]
"""The first one that takes a model and a policy builds the cache."""

QUANTISED: dict[type[Keeper], type[Keeper]] = {
    SharedKeeper: QuantisedSharedKeeper,
    EvictingKeeper: QuantisedEvictingKeeper,
    PagedKeeper: QuantisedPagedKeeper,
    DenseKeeper: QuantisedKeeper,
}
"""Who builds the same kind of cache with quantised pairs."""


def keeper_of(
    model: Decoder,
    policy: EvictionPolicy,
    length: int,
    total: int,
    max_new_tokens: int,
    quantisation: Quantisation | None = None,
) -> Keeper:
    """The keeper for what `Keeper` describes."""
    chosen = next(keeper for keeper in KEEPERS if keeper.takes(model, policy, total))
    chosen = chosen if quantisation is None else QUANTISED[chosen]
    return chosen(model, policy, length, total, max_new_tokens, quantisation)
