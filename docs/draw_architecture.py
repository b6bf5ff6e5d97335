"""Draws docs/architecture.svg from the tree: `python docs/draw_architecture.py`.

The order of packages is that of tests/test_layering.py; a package's line is the first of its docstring.
"""

import ast
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"
WIDTH, LEFT, GAP, PAD = 980, 16, 8, 12
NAME, TEXT, FILES = 17, 16, 15  # line heights
COLOURS = ("#fdf3e7", "#eaf1f8")
INK, GREY, BROWN = "#1d2731", "#55606b", "#7a3b00"


def order() -> tuple[tuple[str, ...], ...]:
    """Packages from the lowest floor up, those that exist."""
    tree = ast.parse((ROOT / "tests" / "test_layering.py").read_text())
    value = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "ORDER")
    floors = ast.literal_eval(value)[1:]  # the first are the native modules, which kernels/ becomes
    present = [tuple(package for package in floor if (ROOT / "moe_lightning" / package).is_dir()) for floor in floors]
    return tuple(floor for floor in present if floor)


def files(folder: Path) -> list[str]:
    """Modules, and folders with a slash."""
    modules = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
    folders = sorted(f"{path.parent.name}/" for path in folder.glob("*/__init__.py"))
    return modules + folders


def box(package: str) -> tuple[str, str, list[str]]:
    """(name, what it is, files) of a package."""
    folder = ROOT / "moe_lightning" / package
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return f"{package}/", docstring.splitlines()[0].replace("`", ""), files(folder)


def kernels() -> tuple[str, str, list[str]]:
    """The same of kernels/."""
    names = [f"{path.name}/" for path in sorted((ROOT / "kernels").iterdir()) if path.is_dir() and path.name != "cuda"]
    names += [f"cuda/{path.name}/" for path in sorted((ROOT / "kernels" / "cuda").iterdir()) if path.is_dir()]
    return (
        "kernels/",
        "C++ and CUDA without a torch header: the modules moe_lightning._cpu and moe_lightning._cuda.",
        names,
    )


def text(x: float, y: float, line: str, size: int, colour: str, style: str = "") -> str:
    """A line of text; `style` holds further attributes."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}"{style}>{escape(line)}</text>'


def draw() -> str:
    """The picture, from the top floor down."""
    floors = [[kernels()], *([box(package) for package in floor] for floor in order())]
    parts, y = [], float(GAP)
    for number, boxes in reversed(list(enumerate(floors))):
        width = (WIDTH - LEFT - GAP * len(boxes) - 34) / len(boxes)
        inner = width - 2 * PAD
        laid = [
            (
                name,
                textwrap.wrap(what, int(inner / 6.4)),
                textwrap.wrap("  ".join(names), int(inner / 6.65), break_on_hyphens=False),
            )
            for name, what, names in boxes
        ]
        height = max(NAME + TEXT * len(what) + FILES * len(names) for _, what, names in laid) + 2 * PAD
        for column, (name, what, names) in enumerate(laid):
            x = LEFT + column * (width + GAP)
            place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
            parts.append(f'<rect {place} rx="6" fill="{COLOURS[number % 2]}" stroke="{GREY}"/>')
            line = y + PAD + 11
            parts.append(text(x + PAD, line, name, 15, INK, ' font-weight="bold"'))
            for words in what:
                line += TEXT
                parts.append(text(x + PAD, line, words, 13, INK))
            for words in names:
                line += FILES
                parts.append(text(x + PAD, line, words, 11, GREY, ' font-family="monospace" xml:space="preserve"'))
        y += height + GAP
    arrow, edge = WIDTH - 24, WIDTH - 8
    parts += [
        f'<line x1="{arrow}" y1="{GAP}" x2="{arrow}" y2="{y - GAP:g}" stroke="{BROWN}" stroke-width="2" '
        'marker-end="url(#a)"/>',
        text(
            edge,
            y / 2,
            "imports run downwards only",
            13,
            BROWN,
            f' text-anchor="middle" transform="rotate(-90 {edge} {y / 2:g})"',
        ),
    ]
    font = 'font-family="Helvetica, Arial, sans-serif"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" {font}>',
        '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">',
        f'<path d="M0 0L10 5L0 10z" fill="{BROWN}"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(PICTURE.relative_to(ROOT))
