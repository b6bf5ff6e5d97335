"""The benchmarks' command line: ``python -m moe_lightning.bench COMMAND [options]``.

A command is a module with ``main(arguments)``; adding one is one line here.
"""

import importlib
import sys

from moe_lightning.utils.checks import check_choice

COMMANDS = {
    "ep": "moe_lightning.bench.ep.command",
    "export": "moe_lightning.bench.commands.export",
    "host": "moe_lightning.bench.commands.host",
    "kernels": "moe_lightning.bench.commands.kernels",
    "layer": "moe_lightning.bench.commands.layer",
    "link": "moe_lightning.bench.ep.link",
    "ops": "moe_lightning.bench.commands.ops",
    "quickstart": "moe_lightning.bench.commands.quickstart",
    "router": "moe_lightning.bench.router.command",
    "scale": "moe_lightning.bench.ep.scale",
    "step": "moe_lightning.bench.step.command",
    "timing": "moe_lightning.bench.commands.timing",
    "trace": "moe_lightning.bench.commands.trace",
}


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    names = ", ".join(COMMANDS)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m moe_lightning.bench COMMAND [options]\ncommands: {names}")
        return 0 if argv else 2
    command, *arguments = argv
    try:
        check_choice("bench", "command", command, COMMANDS)
        importlib.import_module(COMMANDS[command]).main(arguments)  # only now: torch takes a second
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
