"""`restkv report`: the report of a sweep."""

import dataclasses
import pathlib
from collections.abc import Sequence

from restkv_jax.commands.options import as_usage_error, parse
from restkv_jax.evaluate.report.page import TITLE, select, write_report
from restkv_jax.evaluate.results import read_results


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Writes report.html, report.md and pictures of a sweep into its directory, also of an unfinished one.

    A picture kept.png that is in the directory, as `restkv plot` draws it, goes into the report.

    Args:
      directory: of the results, as `restkv evaluate` leaves it.
      title: of the report.
      pairs: methods to compare, such as "restkv > snapkv(kernel_size=21)"; variants with their base if left out.
      draw: methods in the pictures; those that are not variants of others if left out.
    """

    directory: pathlib.Path = dataclasses.field(kw_only=False)
    title: str = TITLE
    pairs: tuple[str, ...] = ()
    draw: tuple[str, ...] = ()


def run(args: Sequence[str]) -> None:
    """Writes the report of a sweep, and says where."""
    options = parse(ReportOptions, args, "restkv report")
    with as_usage_error(f"DIRECTORY {str(options.directory)!r}: "):
        results = read_results(options.directory)
        selection = select(results.grid, options.pairs, options.draw)
        path = write_report(options.directory, title=options.title, results=results, selection=selection)
    print(f"wrote {path}")
