"""The table of a model's parts and parameters that is printed when a run starts."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import RichModelSummary
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from rich import get_console
from rich.table import Table


class ModelSummary(RichModelSummary):
    """Lightning's rich table without the columns that say nothing here.

    Every module is in training mode, and FLOPs are counted only for modules with an example input; see throughput/mfu.
    """

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print it, and the parameters in all below."""
        columns = {name.strip(): values for name, values in summary_data if name not in ("Mode", "FLOPs")}
        table = Table(header_style=summarize_kwargs.get("header_style", "bold"))
        for name in columns:
            table.add_column(name, justify="right" if "Params" in name else "left", no_wrap=name == "Name")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        console = get_console()
        console.print(table)
        frozen = total_parameters - trainable_parameters
        console.print(
            f"{get_human_readable_count(total_parameters).strip()} parameters, {model_size:,.1f} MB"
            + (f", {get_human_readable_count(frozen).strip()} of them frozen" if frozen else ""),
            highlight=False,
        )
