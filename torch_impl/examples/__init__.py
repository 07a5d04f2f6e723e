"""Example programs: each is one file, started by the command in its docstring."""
