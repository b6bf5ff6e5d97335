import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny_run import folder, losses

__all__ = ["folder", "losses"]
