"""Objectives: how group losses become group weights. Each is a small frozen dataclass; docs/objectives.md has them all."""

from rd_kernels.objectives.base import Batch, Objective, Update
from rd_kernels.objectives.online import GroupDRO
from rd_kernels.objectives.worst_case import ERM, ChiSquare, CVaR

__all__ = ["ERM", "Batch", "CVaR", "ChiSquare", "GroupDRO", "Objective", "Update"]
