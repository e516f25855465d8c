"""Which layers share the keys of distant tokens, and which tokens are distant (PoD, arXiv 2412.02252)."""

import dataclasses
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from restkv_jax.models.arguments import check_integer, check_number
from restkv_jax.models.config import ModelConfig
from restkv_jax.models.files import written_whole

if TYPE_CHECKING:
    from restkv_jax.models.decoder import Decoder

FILE = "layer_groups.json"
"""The name under which groups stand beside a checkpoint."""


@dataclasses.dataclass(frozen=True)
class LayerGroups:
    """For every layer and KV head the layer whose keys it uses for distant tokens, its leader (PoD).

    Layers of one head that follow one another and have the same leader, their lowest layer, are a block. Hashable, so
    static under `jax.jit`.

    Attributes:
      leader: [L][K] integers; nested tuples, whatever was given.
    """

    leader: Any

    def __post_init__(self):
        leader = _as_integers(self.leader)
        object.__setattr__(self, "leader", tuple(tuple(row) for row in leader.tolist()))
        layers = np.arange(len(leader))[:, None]
        _refuse(leader > layers, leader, "is above its layer; a leader is the lowest layer of its block")
        _refuse(leader < 0, leader, "is negative")
        before = np.vstack([leader[:1], leader[:-1]])
        _refuse(
            (leader != layers) & (leader != before), leader,
            "is neither its own layer nor the leader of the layer below: blocks must be contiguous",
        )  # fmt: skip

    @classmethod
    def dense(cls, num_layers: int, num_kv_heads: int) -> "LayerGroups":
        """One block per layer: every layer uses its own keys."""
        return cls(np.repeat(np.arange(num_layers)[:, None], num_kv_heads, axis=1))

    @property
    def num_layers(self) -> int:
        """`L`."""
        return len(self.leader)

    @property
    def num_kv_heads(self) -> int:
        """`K`."""
        return len(self.leader[0])

    @property
    def num_blocks(self) -> int:
        """`R`, the blocks of all KV heads together."""
        return int(self.is_leader.sum())

    @property
    def blocks(self) -> np.ndarray:
        """int32 [L, K], the number of each layer and head's block, from 0 to `R - 1`; leaders' ascend."""
        return self.in_parts(1)[0]

    def in_parts(self, parts: int) -> tuple[np.ndarray, int]:
        """Blocks numbered within each of `parts` parts of the KV heads, int32 [L, K], and how many the largest has."""
        by_part = np.split(self.is_leader, parts, axis=1)
        numbers = [np.cumsum(part).reshape(part.shape) - 1 for part in by_part]
        blocks = np.take_along_axis(np.concatenate(numbers, axis=1), np.array(self.leader), axis=0)
        return blocks.astype(np.int32), max(int(part.sum()) for part in by_part)

    @property
    def longest_block(self) -> int:
        """Layers of the longest block."""
        return int((np.arange(self.num_layers)[:, None] - np.array(self.leader)).max()) + 1

    @property
    def is_leader(self) -> np.ndarray:
        """bool [L, K]."""
        return np.array(self.leader) == np.arange(self.num_layers)[:, None]

    def cache_fraction(self, tokens: int, sink: int = 16, recent: int = 4080) -> float:
        """What the cache of a sequence holds, as a fraction of the full one's.

        Values and the keys of `sink + recent` tokens per layer, further keys per block:
        `(L K T + L K min(T, P) + R max(T - P, 0)) / (2 L K T)` with `P = sink + recent`.

        Args:
          tokens: `T`, of the sequence.
          sink: tokens at the beginning whose keys each layer keeps.
          recent: tokens at the end whose keys each layer keeps.
        """
        check_integer("tokens", tokens, 1, "of the sequence")
        heads = self.num_layers * self.num_kv_heads
        proximal = min(tokens, sink + recent)
        return (heads * (tokens + proximal) + self.num_blocks * (tokens - proximal)) / (2 * heads * tokens)

    def check_model(self, config: ModelConfig) -> None:
        """Refuses a model that these groups cannot be of.

        Raises:
          ValueError: another number of layers or KV heads.
        """
        ours, theirs = (self.num_layers, self.num_kv_heads), (config.num_hidden_layers, config.num_key_value_heads)
        if ours != theirs:
            raise ValueError(
                f"groups are of a model with {ours[0]} layers and {ours[1]} KV heads, but this one has {theirs[0]} and "
                f"{theirs[1]}; find its own with restkv_jax.pod.attention_similarity and group_layers"
            )

    def save(self, path: str | os.PathLike, model: "Decoder", name: str | None = None) -> None:
        """Writes the groups as JSON, with what tells their model from others; the file appears whole or not at all.

        Args:
          path: a file, or a checkpoint's directory, which gets a `layer_groups.json`.
          model: whose layers these are.
          name: of the model, such as its id on the hub; `load` compares it.

        Raises:
          ValueError: groups that cannot be of this model; a file that says how an adapted model shares keys.
        """
        check_groups_file(path)
        _write(path, self, model, {"name": name})

    @classmethod
    def load(cls, path: str | os.PathLike, model: "Decoder | None" = None, name: str | None = None) -> "LayerGroups":
        """Reads groups that `save` wrote.

        Args:
          path: the file, or the checkpoint's directory.
          model: the one to use them with; None does not compare.
          name: of the model; None does not compare.

        Raises:
          FileNotFoundError: no such file.
          ValueError: a damaged file, or groups made for another model.
        """
        return _read(path, model, {} if name is None else {"name": name})[0]


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How a model shares keys, static under `jax.jit`.

    For a query at position `q`, proximal are the first `sink` tokens and the last `recent`, `q - recent < p <= q`: the
    layer reads them by its own keys. The rest of the past is distant and read by the leader's. Values are always the
    layer's own, and one softmax goes over both.

    Attributes:
      groups: who leads whom.
      sink: tokens at the beginning whose keys each layer keeps.
      recent: tokens at the end, the newest included, whose keys each layer keeps.
      skip_threshold: while decoding, leaves a layer's distant tokens out where its leader found them unimportant: for
        each row and KV head that is not a leader, if in its leader the proximal tokens held at least this share of
        the attention of every query head of the group. Leaders, and prompts, are read whole. The leader stands for
        the layer because a layer's own share is known only after the distant keys were read, which is what skipping
        saves; blocks are made of layers that attend alike. None never skips.
    """

    groups: LayerGroups
    sink: int = 16
    recent: int = 4080
    skip_threshold: float | None = None

    def __post_init__(self):
        if not isinstance(self.groups, LayerGroups):
            raise TypeError(f"groups={self.groups!r} must be LayerGroups, such as LayerGroups.load(directory) gives")
        check_integer("sink", self.sink, 0, "tokens at the beginning")
        check_integer("recent", self.recent, 1, "a token reads itself by its own layer's key")
        if self.skip_threshold is not None:
            check_number("skip_threshold", self.skip_threshold, "a share of attention")
            if not 0 <= self.skip_threshold <= 1:
                raise ValueError(f"skip_threshold={self.skip_threshold} must be a share of attention, from 0 to 1")

    @property
    def proximal(self) -> int:
        """Tokens that each layer reads by its own keys, at most."""
        return self.sink + self.recent

    def distant(self, length: int) -> int:
        """Distant tokens of a sequence of `length` as its last token sees them."""
        return max(length - self.proximal, 0)

    def save(self, path: str | os.PathLike, model: "Decoder") -> None:
        """Writes groups and sizes beside an adapted model's weights, from where `load_model` brings them back.

        Args:
          path: the checkpoint's directory.
          model: the one that shares keys in this way.
        """
        sizes = {name: getattr(self, name) for name in SIZES}
        _write(path, self.groups, model, sizes)

    @classmethod
    def load(cls, path: str | os.PathLike, model: "Decoder") -> "Sharing | None":
        """What `save` wrote; None where there is no such file, or groups alone, which no model was adapted to.

        Raises:
          ValueError: a damaged file, or one of another model.
        """
        if not _file(path).is_file():
            return None
        groups, fields = _read(path, model, {})
        if not fields.keys() >= set(SIZES):
            return None
        try:
            return cls(groups, **{name: fields[name] for name in SIZES})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_file(path)}: {error}") from error


SIZES = "sink", "recent", "skip_threshold"
"""What a file of an adapted model says besides its groups."""


def check_groups_file(path: str | os.PathLike) -> None:
    """Refuses to write groups over what `Sharing.save` wrote: the model beside it would share no keys any more.

    Raises:
      ValueError: such a file.
    """
    try:
        fields = json.loads(_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(fields, dict) and fields.keys() >= set(SIZES):
        raise ValueError(f"{_file(path)} says how an adapted model shares keys, and would be lost; give another file")


def _write(path: str | os.PathLike, groups: LayerGroups, model: "Decoder", fields: dict[str, Any]) -> None:
    groups.check_model(model.config)
    path = _file(path)
    text = json.dumps({**fields, **_description(model.config), "leader": groups.leader}, indent=1)
    with written_whole(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")


def _read(
    path: str | os.PathLike, model: "Decoder | None", expected: dict[str, Any]
) -> tuple[LayerGroups, dict[str, Any]]:
    """The groups of a file and all that it says."""
    path = _file(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        groups = LayerGroups(fields["leader"])
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no layer groups ({error}); write them with LayerGroups.save") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for field, value in (({} if model is None else _description(model.config)) | expected).items():
        if fields.get(field) != value:
            raise ValueError(
                f"{path}: these groups were made for another model: {field} is {fields.get(field)!r} there, "
                f"{value!r} here"
            )
    return groups, fields


def _description(config: ModelConfig) -> dict[str, Any]:
    """What must agree between a model and the one whose groups are loaded."""
    names = "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"
    return {name: getattr(config, name) for name in names}


def _file(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    return path / FILE if path.is_dir() else path


def _as_integers(leader: Any) -> np.ndarray:
    try:
        array = np.asarray(leader)
    except ValueError as error:
        raise ValueError("leader must be [layers][KV heads]; its rows differ in length") from error
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"leader has shape {array.shape}, but must be [layers, KV heads]")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"leader has dtype {array.dtype}, but must hold integers")
    return array


def _refuse(wrong: np.ndarray, leader: np.ndarray, reason: str) -> None:
    if wrong.any():
        layer, head = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"leader[{layer}][{head}]={leader[layer, head]} {reason}")
