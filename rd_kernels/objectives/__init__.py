"""Objectives: how group losses become group weights. Each is a small frozen dataclass; docs/objectives.md has them all."""

from rd_kernels.objectives.base import Batch, Objective, Update
from rd_kernels.objectives.online import DoReMi, GroupDRO
from rd_kernels.objectives.worst_case import ERM, KL, ChiSquare, CVaR, Tilted, WorstGroup

__all__ = [
    "ERM",
    "KL",
    "Batch",
    "CVaR",
    "ChiSquare",
    "DoReMi",
    "GroupDRO",
    "Objective",
    "Tilted",
    "Update",
    "WorstGroup",
]
