"""The commands of `restkv` that measure methods and report on them."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from restkv_jax.options import UsageError, as_usage_error, parse


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Writes report.html, report.md and pictures of a sweep into its directory, also of an unfinished one.

    A picture kept.png that is in the directory, as `restkv plot` draws it, goes into the report.

    Args:
      directory: of the results, as `restkv evaluate` leaves it.
      title: of the report.
    """

    directory: tyro.conf.Positional[pathlib.Path]
    title: str = "What evicting the KV cache costs in answers"


def run_report(args: Sequence[str]) -> None:
    """`restkv report`: writes the report of a sweep.

    Raises:
      UsageError: a directory without a sweep or without results; a package that is missing.
    """
    options = parse(ReportOptions, args, "restkv report", (ReportOptions,))
    try:
        from restkv_jax.evaluate.report import write_report
    except ModuleNotFoundError as error:
        raise UsageError(f"`restkv report` needs the package {error.name!r}: pip install 'restkv-jax[eval]'") from error
    with as_usage_error(f"DIRECTORY {str(options.directory)!r}: "):
        path = write_report(options.directory, title=options.title)
    print(f"wrote {path}")
