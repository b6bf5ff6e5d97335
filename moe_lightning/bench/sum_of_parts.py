"""Whether the parts of a whole, each timed by itself, add up to the whole timed in one go."""

from __future__ import annotations

from typing import Any

from moe_lightning.bench.spread import TOO_NOISY, Spread, with_spread

GAP = 0.10  # parts further than this from the whole are reported


def sum_of_parts(parts: Spread, whole: Spread) -> dict[str, Any]:
    """Both in microseconds, `gap` = parts / whole - 1, and the verdict: none on times that are too noisy to tell."""
    gap = parts.median / whole.median - 1
    noisy = parts.doubt or whole.doubt
    verdict = TOO_NOISY if noisy else f"over {GAP:.0%}" if abs(gap) > GAP else f"within {GAP:.0%}"
    spread = {"parts_us": parts, "whole_us": whole}
    return {"parts_us": parts.median, "whole_us": whole.median, "gap": gap, "verdict": verdict, "spread": spread}


def sentence(check: dict[str, Any], parts: str, whole: str) -> str:
    """One line; the gap is left out where it cannot be told."""
    us: tuple[Spread, Spread] = check["spread"]["parts_us"], check["spread"]["whole_us"]
    texts = [with_spread(f"{spread.median:,.1f} us", spread) for spread in us]
    both = f"{parts} {texts[0]}, {whole} {texts[1]}"
    if check["verdict"] == TOO_NOISY:
        return f"{TOO_NOISY}: {both} ({us[0].doubt or us[1].doubt})"
    warning = f"OVER {GAP:.0%}: " if check["verdict"] == f"over {GAP:.0%}" else ""
    return f"{warning}{both}, gap {check['gap']:+.1%}"
