"""Lightning's way to checkpoint files that are verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from moe_lightning.utils.checkpoint_file import load_checkpoint, save_checkpoint


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Atomic save (temporary file, fsync, rename) with a digest; load verifies it and unpickles weights only."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` so that `path` is, at every moment, the old file or the whole new one."""
        save_checkpoint(checkpoint, path)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a verified file; `weights_only` cannot be switched off."""
        return load_checkpoint(path, map_location or "cpu")
