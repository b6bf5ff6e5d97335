"""The benchmarks' command line: ``python -m moe_lightning.bench COMMAND [options]``.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> results``; its docstring is its help.
"""

import argparse
import difflib
import importlib
import sys
from pathlib import Path

COMMANDS = {
    "ops": "moe_lightning.bench.ops",
}


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    names = ", ".join(COMMANDS)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m moe_lightning.bench COMMAND [options]\ncommands: {names}")
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {names}"
        print(f"bench: unknown command, got {name!r}; {hint}", file=sys.stderr)
        return 2

    command = importlib.import_module(COMMANDS[name])  # only now: torch takes a second
    parser = argparse.ArgumentParser(f"python -m moe_lightning.bench {name}", description=command.__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as a record")
    command.add_arguments(parser)
    args = parser.parse_args(rest)
    try:
        results = command.run(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        from moe_lightning.bench.record import write_record

        write_record(args.json, name, results)
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
