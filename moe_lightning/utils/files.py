"""A text file that is there whole or not at all, and what the disk had against it."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` in place of what is there; missing folders are made, and an OSError leaves nothing behind."""
    draft = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def os_error_behind(error: BaseException | None) -> OSError | None:
    """The OSError that an error is, or that it arose from: libraries wrap a full disk in errors of their own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
