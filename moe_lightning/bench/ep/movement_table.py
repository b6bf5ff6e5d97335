"""What moving the rows costs, as a table: by exchanges, and beside them written to other ranks' memory."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from moe_lightning.bench.spread import with_spread

COLUMNS = {
    "gather + dispatch": "T_dispatch",
    "graph": "T_dispatch_graph",
    "all_to_all alone": "T_all_to_all",
    "beyond it": "beyond_all_to_all",
    "combine": "T_combine",
    "combine graph": "T_combine_graph",
    "layer": "T_layer",
    "eta": "eta_overlap",
    "eta_ect": "eta_ect",
}


def movement_table(found: list[dict[str, Any]], dispatch: str, backward: bool) -> Table:
    """Two lines per case that was measured both ways."""
    title = "rows there and back, forward"
    table = Table(title=f"{title}; layer: forward + backward" if backward else title, title_justify="left")
    for column in ("rows of", "chunks", "by"):
        table.add_column(column, no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in found:
        exchange = "exchanges" if dispatch == "symmetric" else dispatch
        layer = {"T_layer": row["spread"]["T_overlapped"]}
        exchanged = {**row, "T_layer": row["T_overlapped"], "spread": row["spread"] | layer}
        for by, times in ((exchange, exchanged), ("symmetric", row.get("symmetric"))):
            if times is not None:
                cells = (with_spread(_cell(key, times.get(key)), times["spread"].get(key)) for key in COLUMNS.values())
                table.add_row(row["strategy"], str(row["chunks"]), by, *cells)
    return table


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if key.startswith("eta") else f"{value:,.1f}"
