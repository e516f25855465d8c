"""How a model's makers draw tokens: what its `generation_config.json` says of sampling."""

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

GENERATION_CONFIG = "generation_config.json"
KINDS = {"temperature": (int, float), "top_k": (int,), "top_p": (int, float), "min_p": (int, float)}
WRITTEN_ELSEWHERE = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config")
"""What `config.json` or the writer of a file says as well."""


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """Sampling options by the names of `generate`; None where the model's makers do not say.

    `do_sample` is whether transformers draws without being told to; nothing here draws without a key. `others` are the
    file's fields that nothing here uses, such as a repetition penalty, as JSON: a model is saved with them, and is
    equal to one with others.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    do_sample: bool = False
    others: str = dataclasses.field(default="{}", compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """Those that are given, as keyword arguments of `generate`."""
        return {name: value for name in KINDS if (value := getattr(self, name)) is not None}


def read_sampling(fields: Mapping[str, Any]) -> SamplingDefaults:
    """Reads the fields of a `generation_config.json`, where `top_k` of 0 or less means none.

    Raises:
      ValueError: a value that is not a number.
    """
    given = {name: fields[name] for name in KINDS if fields.get(name) is not None}
    for name, value in given.items():
        if type(value) not in KINDS[name] or not math.isfinite(value):
            kind = "an integer" if KINDS[name] == (int,) else "a number"
            raise ValueError(f"{name}={reprlib.repr(value)} must be {kind}; null means none")
    if given.get("top_k", 1) < 1:
        del given["top_k"]
    known = {*KINDS, "do_sample", *WRITTEN_ELSEWHERE}
    others = {name: value for name, value in fields.items() if name not in known and value is not None}
    return SamplingDefaults(
        **given, do_sample=fields.get("do_sample") is True, others=json.dumps(others, sort_keys=True)
    )


def sampling_fields(sampling: SamplingDefaults) -> dict[str, Any]:
    """The fields of a `generation_config.json` that `read_sampling` reads."""
    return {"do_sample": sampling.do_sample} | sampling.options | json.loads(sampling.others)
