from tiny_run import folder, losses, parsed

__all__ = ["folder", "losses", "parsed"]
