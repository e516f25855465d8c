"""What the terminal says while nothing else can be seen."""

import contextlib

from rich.console import Console


def show_while(doing: str, quiet: bool = False) -> contextlib.AbstractContextManager:
    """A line on standard error that goes away with the block; none where that is not a terminal, or with `quiet`."""
    console = Console(stderr=True)
    return console.status(doing) if console.is_terminal and not quiet else contextlib.nullcontext()
