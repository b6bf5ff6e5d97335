"""A checkpoint and the model it is loaded into must have the same sizes; every difference is named."""

from __future__ import annotations

from typing import Any


def check_same_architecture(saved: dict[str, Any] | None, current: dict[str, Any]) -> None:
    """Raise ValueError naming each field that differs, saved and current."""
    if saved is None:
        raise ValueError("checkpoint: it must hold an 'architecture', got none; it was not written by moe_lightning")
    fields = [*saved, *(field for field in current if field not in saved)]
    differences = [
        f"{field} saved={saved.get(field, 'none')} current={current.get(field, 'none')}"
        for field in fields
        if saved.get(field) != current.get(field)
    ]
    if differences:
        raise ValueError(
            f"checkpoint: the model must have the saved sizes, got {'; '.join(differences)}; "
            "use the configuration it was trained with"
        )
