"""The command line: each command parses, calls the library and renders; nothing is computed here.

Errors that the library raises on purpose become one line on stderr and exit code 2. Heavy imports happen inside the
command that needs them, so that ``manidp --help`` is fast and works with the base dependencies alone.
"""

from manidp.cli.app import app, main

__all__ = ["app", "main"]
