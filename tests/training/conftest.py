from tiny_run import fit_alone, folder, losses, one_thread, parsed

__all__ = ["fit_alone", "folder", "losses", "one_thread", "parsed"]
