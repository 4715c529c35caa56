"""Group-robust losses fused into one differentiable op.

Importing this imports torch, but neither triton nor the native kernels: a backend is loaded when first used.
"""

from rd_kernels import backends, functional
from rd_kernels.backends import empty_cache, use_backend
from rd_kernels.losses import CrossEntropyLoss, GroupDROLoss, LinearGroupDROLoss
from rd_kernels.objectives import (
    ERM,
    KL,
    Batch,
    ChiSquare,
    CVaR,
    DoReMi,
    GroupDRO,
    Objective,
    Tilted,
    Update,
    WorstGroup,
)
from rd_kernels.report import GroupReport, GroupStats

__version__ = "0.1.0"

__all__ = [
    "ERM",
    "KL",
    "Batch",
    "CVaR",
    "ChiSquare",
    "CrossEntropyLoss",
    "DoReMi",
    "GroupDRO",
    "GroupDROLoss",
    "GroupReport",
    "GroupStats",
    "LinearGroupDROLoss",
    "Objective",
    "Tilted",
    "Update",
    "WorstGroup",
    "backends",
    "empty_cache",
    "functional",
    "use_backend",
]
