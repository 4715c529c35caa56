"""How every picture of the application looks. Colours follow Okabe and Ito, so that colour-blind readers tell them
apart."""

from __future__ import annotations

from typing import Any

__all__ = ["FAINT", "INK", "STYLE"]

INK, FAINT = "#222222", "#8a8a8a"
STYLE: Any = {
    "font.size": 11, "axes.titlesize": 12.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 10.5, "xtick.labelsize": 10, "ytick.labelsize": 10.5, "legend.fontsize": 10.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False, "figure.dpi": 110, "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a group's name is a dollar
}  # fmt: skip
