"""The logits op, forward and backward with Group DRO."""

import pytest

from benchmarks import others
from benchmarks.cases import LogitsCase
from benchmarks.floor import FreshFloor, InPlaceFloor
from benchmarks.peers import Compiled, Eager, EagerMean, Ours, OursInPlace, OursMean, OursReference

HEADLINE = (LogitsCase(1024, 30522, "fp32"), LogitsCase(1024, 30522, "bf16"))
# Sparse MLM, one row, small and large vocabularies; at most 0.6 GB each.
SHAPES = (
    LogitsCase(16384, 1000, "fp32"),
    LogitsCase(16384, 1000, "bf16"),
    LogitsCase(1, 30522, "fp32"),
    LogitsCase(154, 30522, "fp32"),
    LogitsCase(4096, 30522, "fp32"),
    LogitsCase(512, 128256, "fp32"),
    LogitsCase(1024, 128256, "bf16"),
    LogitsCase(1, 262144, "bf16"),
    LogitsCase(512, 262144, "fp32"),
)
LATENCY = (LogitsCase(8, 64), LogitsCase(32, 1000))  # microseconds: the cost of a call

FLOORS = (FreshFloor(), InPlaceFloor())


@pytest.mark.contest(
    cases=HEADLINE,
    peers=(
        *FLOORS,
        Ours(),
        OursInPlace(),
        OursMean(),
        OursReference(),
        Eager(),
        EagerMean(),
        Compiled(),
        *others.LOGITS,
    ),
    quick=True,
)
def test_headline(measure):
    measure()


@pytest.mark.contest(cases=SHAPES, peers=(*FLOORS, Ours(), OursInPlace(), OursMean(), Eager()))
def test_shapes(measure):
    measure()


@pytest.mark.contest(cases=LATENCY, peers=(Ours(), OursMean(), Eager(), EagerMean(), Compiled()), quick=True)
def test_latency(measure):
    measure()
