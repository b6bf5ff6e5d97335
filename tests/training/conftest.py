from tiny_run import fit_alone, folder, losses, parsed

__all__ = ["fit_alone", "folder", "losses", "parsed"]
