"""Models with an evicted cache for lm-evaluation-harness: importing this file registers `restkv`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    has_bos_prefix,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from restkv_jax.evaluate.harness.batches import Batch, Prompted, Scored, filled, make_batches, padded_length
from restkv_jax.evaluate.harness.blocks import stream_blocks
from restkv_jax.evaluate.harness.fitting import commit_in_cache, fitting_batch
from restkv_jax.evaluate.harness.likelihood import score_continuation, score_text
from restkv_jax.evaluate.harness.model_args import ModelArgs, parse_model_args
from restkv_jax.generation.checks import check_sampling
from restkv_jax.generation.encoding import pad_left
from restkv_jax.generation.reading import bucket_length
from restkv_jax.loading import Loaded, load_checkpoint
from restkv_jax.models import checkpoint
from restkv_jax.models.digest import checksum
from restkv_jax.models.mesh import divisible, make_mesh
from restkv_jax.models.tokenizer import load_tokenizer

EMBEDDED = str(checkpoint.EMBEDDED)
"""The model that comes with the package, as a string for tasks that load a tokenizer by `pretrained`."""

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
GEN_KWARGS = ("until", "max_gen_toks", "do_sample", *SAMPLING)
"""What tasks and `--gen_kwargs` may say about generation."""


@register_model("restkv")
class RestKV(TemplateLM):
    """A Llama-family model whose cache keeps a budget of each prompt, for `lm_eval.simple_evaluate(model="restkv")`.

    Contexts and prompts are read with the method's eviction; answers are generated, and continuations scored token by
    token, on what is left. Whole texts (`loglikelihood_rolling`) have no context to evict and are read with plain
    attention. A budget in percent is of each prompt's `bucket_length`. Prompts of one bucket go through one compiled
    program, longest first, in batches that give what each prompt gives alone; continuations are padded to 1, 4, 16, ...
    tokens. Prompts that leave no room for the answer within `max_length` are cut from the left.

    Args:
      device: not looked at, as the harness always gives one; JAX chooses, or the variable `JAX_PLATFORMS`.
      max_batch_size: most prompts of a batch where `batch_size` is "auto"; refused where it is not.
      trust_remote_code: for the tasks' data sets; a model's own code is never run.
      model_args: the fields of `restkv_jax.evaluate.harness.model_args.ModelArgs` and the method's options.

    Raises:
      ValueError: an unknown method or option, or a model that cannot be loaded.
    """

    def __init__(
        self,
        device: str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool = False,
        **model_args: Any,
    ):
        super().__init__()
        self.parsed = parse_model_args(model_args)
        args = self.parsed.general
        if max_batch_size is not None and args.batch_size != "auto":
            raise ValueError(f"max_batch_size={max_batch_size} bounds batch_size='auto'; leave it out")
        self.model, self.params, self.tokenizer = load_model_of(args)
        self.max_length = args.max_length or self.model.config.context_length
        self.batch_size = args.batch_size
        self.max_batch_size = max_batch_size
        self.batch_sizes: dict[int, int] = {}

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "RestKV":
        """The model from `model_args`, which go before the harness's own settings, such as its batch size of 1."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(given | arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "RestKV":
        """As `create_from_arg_obj`, from `name=value,name=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: size, dtype and version of the model."""
        leaves = jax.tree.leaves(self.params)
        sha = commit_in_cache(self.parsed.general.pretrained)
        return {
            "model_num_parameters": sum(leaf.size for leaf in leaves),
            "model_dtype": str(leaves[0].dtype),
            "model_revision": "main" if sha else "",
            "model_sha": sha,
            "model_checksum": checksum(self.params),
        }

    def _size_for(self, length: int) -> int:
        """Prompts of a batch, for texts of `length` tokens; noted for the harness where it is found by itself."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        fitting = fitting_batch(self.model, self.params, length)
        self.batch_sizes[length] = min(fitting, self.max_batch_size or fitting)
        return self.batch_sizes[length]

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        ids = self.model.config.eos_token_ids
        own = self.tokenizer.eos_token_id
        return ids[0] if own is None and ids else own

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        known = self.tokenizer.bos_token_id, self.eot_token_id, self.tokenizer.pad_token_id
        return next((token for token in known if token is not None), 0)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation in the tokenizer's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids; by default with the tokenizer's special tokens where the text does not begin with them."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.bos_token)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        items = [self._fit(Scored(i, *request)) for i, request in enumerate(requests)]
        self._try_policy(item.context for item in items)
        batches = self._batches(items, lambda item: (padded_length(item),), lambda item: item.context)
        results: list[Any] = [None] * len(items)
        for batch in self._progress(batches, len(items), disable_tqdm):
            for item, result in zip(batch.items, self._score(*batch), strict=True):
                results[item.index] = result
                self.cache_hook.add_partial("loglikelihood", item.texts, result)
        return results

    def _fit(self, item: Scored) -> Scored:
        """Cuts from the left what exceeds `max_length`; one token of context stays."""
        continuation = item.continuation[-self.max_length :]
        # the last token is not read
        context, _ = maybe_truncate(item.context or [self.prefix_token_id], len(continuation) - 1, self.max_length)
        return item._replace(context=context, continuation=continuation)

    def _score(self, batch: Sequence[Scored], size: int) -> Iterable[tuple[float, bool]]:
        length = bucket_length(max(len(item.context) for item in batch))
        rows = filled(batch, size)
        tokens, mask = pad_left([item.context for item in rows], length)
        continuation = np.zeros((len(rows), max(map(padded_length, rows))), np.int32)
        for row, item in zip(continuation, rows, strict=True):
            row[: len(item.continuation)] = item.continuation
        how = self.parsed.policy, self.parsed.general.cache_dtype
        found = score_continuation(self.model, self.params, tokens, mask, jnp.asarray(continuation), *how)
        log_probabilities, is_greedy = (np.asarray(x) for x in found)
        for b, item in enumerate(batch):
            count = len(item.continuation)
            yield float(log_probabilities[b, :count].sum(dtype=np.float64)), bool(is_greedy[b, :count].all())

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in windows of `max_length` tokens, under plain attention."""
        windows = [
            Scored(i, None, *make_disjoint_window(window))
            for i, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
        ]
        batches = self._batches(windows, lambda item: (), lambda item: item.context + item.continuation[:-1])
        totals = [0.0] * len(requests)
        for batch in self._progress(batches, len(windows), disable_tqdm):
            for item, total in zip(batch.items, self._score_windows(*batch), strict=True):
                totals[item.index] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score_windows(self, batch: Sequence[Scored], size: int) -> list[float]:
        rows = [item.context + item.continuation for item in filled(batch, size)]
        length = bucket_length(max(map(len, rows)) - 1)
        tokens, mask = pad_left([row[:-1] for row in rows], length)
        targets, _ = pad_left([row[1:] for row in rows], length)
        log_probabilities = np.asarray(score_text(self.model, self.params, tokens, mask, targets).log_probabilities)
        return [
            float(log_probabilities[b, -len(item.continuation) :].sum(dtype=np.float64)) for b, item in enumerate(batch)
        ]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Texts that follow the prompts, up to a stop string, the end of the text or `max_gen_toks` tokens."""
        items = [self._prompted(i, *request.args) for i, request in enumerate(requests)]
        self._try_policy(item.tokens for item in items)
        batches = self._batches(items, lambda item: (item.max_new_tokens, repr(item.options)), lambda item: item.tokens)
        texts = [""] * len(items)
        for batch in self._progress(batches, len(items), disable_tqdm):
            for item, text in zip(batch.items, self._generate(*batch), strict=True):
                texts[item.index] = text
                self.cache_hook.add_partial("generate_until", item.arguments, text)
        return texts

    def _prompted(self, index: int, text: str, given: dict) -> Prompted:
        options = check_gen_kwargs(given, self.parsed.general.max_gen_toks)
        room = options["max_gen_toks"]
        if room >= self.max_length:
            raise ValueError(
                f"max_gen_toks={room} leaves no room for a prompt within max_length={self.max_length}; "
                "lower it, or raise max_length in model_args"
            )
        # a text without tokens still needs one to go on from
        tokens, _ = maybe_truncate(self.tok_encode(text) or [self.prefix_token_id], room, self.max_length)
        return Prompted(index, (text, given), tokens, options, room)

    def _generate(self, batch: Sequence[Prompted], size: int) -> list[str]:
        length = bucket_length(max(len(item.tokens) for item in batch))
        rows = filled(batch, size)
        tokens, mask = pad_left([item.tokens for item in rows], length)
        options = batch[0].options
        keys = sampling = None
        if options["do_sample"]:
            key = jax.random.key(self.parsed.general.seed)
            keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray([item.index for item in rows]))
            sampling = {name: options.get(name) for name in SAMPLING}
        so_far = np.zeros((len(rows), 0), np.int32)
        blocks = stream_blocks(
            self.model, self.params, tokens, mask, self.parsed.policy, batch[0].max_new_tokens, keys, sampling,
            cache_dtype=self.parsed.general.cache_dtype,
        )  # fmt: skip
        for block in blocks:
            so_far = np.concatenate([so_far, block], axis=1)
            answers = [self._cut(row, options["until"]) for row in so_far[: len(batch)]]
            if all(ended for _, ended in answers):
                break
        return [text for text, _ in answers]

    def _cut(self, tokens: np.ndarray, until: list[str]) -> tuple[str, bool]:
        """The text before the first stop string or end token, and whether there is one."""
        added = self.tokenizer.get_added_vocab()
        ends = {*self.model.config.eos_token_ids, self.eot_token_id, *(added[stop] for stop in until if stop in added)}
        places = np.flatnonzero(np.isin(tokens, [token for token in ends if token is not None]))
        text = self.tokenizer.decode(tokens[: places[0]] if places.size else tokens, skip_special_tokens=True)
        cut = postprocess_generated_text(text, until, None)
        return cut, bool(places.size) or cut != text

    def _try_policy(self, prompts: Iterable[list[int]]) -> None:
        """Refuses a policy that some prompt's length refuses, before anything runs."""
        for length in sorted({bucket_length(len(tokens)) for tokens in prompts}):
            self.parsed.policy.resolved(length)

    def _batches(
        self, items: Sequence[Any], also: Callable[[Any], tuple], tokens_of: Callable[[Any], list[int]]
    ) -> Iterator[Batch]:
        """As `make_batches`, of sizes that the devices divide."""
        for batch in make_batches(items, also, tokens_of, self._size_for):
            yield batch._replace(size=divisible(batch.size, self.params))

    def _progress(self, batches: Iterable[Batch], total: int, disable: bool) -> Iterator[Batch]:
        with tqdm(total=total, disable=disable or self.rank != 0, desc="Running requests") as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch.items))


def load_model_of(args: ModelArgs) -> Loaded:
    """Model, parameters and tokenizer.

    Raises:
      ValueError: a model or tokenizer that cannot be loaded.
    """
    mesh = None
    if args.model_parallel * args.data_parallel > 1:
        mesh = make_mesh(args.data_parallel, args.model_parallel)
    loaded = load_checkpoint(args.pretrained, args.dtype, args.tokenizer is None, args.dense, mesh)
    if args.tokenizer is None:
        return loaded
    try:
        return loaded._replace(tokenizer=load_tokenizer(args.tokenizer))
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer={args.tokenizer!r} cannot be loaded: {error}") from error


def check_gen_kwargs(given: dict, max_gen_toks: int) -> dict[str, Any]:
    """A task's options of generation, normalised by the harness and refused where they would have no effect.

    Args:
      given: as the task or `--gen_kwargs` gives them.
      max_gen_toks: most tokens to generate, where they do not say.

    Raises:
      ValueError: an option that is not supported, or a value out of range.
    """
    options: dict[str, Any] = dict(normalize_gen_kwargs(given, max_gen_toks))
    for name, value in options.items():
        if name not in GEN_KWARGS and (name, value) != ("num_beams", 1):
            raise ValueError(f"gen_kwargs: {name}={value!r} is not supported; known: {', '.join(GEN_KWARGS)}")
    if options["max_gen_toks"] < 1:
        raise ValueError(f"gen_kwargs: max_gen_toks={options['max_gen_toks']} must be at least 1")
    if options["do_sample"]:
        options.setdefault("temperature", 1.0)
        check_sampling(jax.random.key(0), *(options.get(name) for name in SAMPLING))
    return options
