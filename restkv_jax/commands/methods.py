"""`restkv methods`: the methods, their references and their options."""

import inspect
from collections.abc import Sequence

import docstring_parser
from rich.console import Console
from rich.table import Table

from restkv_jax.commands.method_options import OF_ANY
from restkv_jax.commands.options import UsageError
from restkv_jax.eviction.methods.registry import METHODS


def run(args: Sequence[str]) -> None:
    """Prints every method's reference and its options with defaults."""
    if args and args[0] not in ("--help", "-h"):
        raise UsageError(f"unexpected argument {args[0]!r}: `restkv methods` takes none")
    console = Console(highlight=False)
    for name, preset in METHODS.items():
        documentation = docstring_parser.parse(inspect.getdoc(preset) or "")
        console.print(f"[bold]{name}[/bold]  {documentation.short_description}", soft_wrap=True)
        table = Table.grid(padding=(0, 2))
        for parameter in inspect.signature(preset).parameters.values():
            text = next((p.description for p in documentation.params if p.arg_name == parameter.name), "")
            table.add_row("", f"{parameter.name}={parameter.default}", text)
        console.print(table)
    console.print("[bold]all with a budget[/bold]  Where the method has no such option of its own.", soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    for name, kind in OF_ANY.items():
        table.add_row("", f"{name}=None", kind.__metadata__[0].help)
    console.print(table)
