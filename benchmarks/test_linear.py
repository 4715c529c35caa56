"""The linear op: logits from hidden states, weight and bias, and the gradients of all three."""

import pytest

from benchmarks import others
from benchmarks.cases import LinearCase
from benchmarks.floor import ThreeGemms
from benchmarks.peers import Compiled, Eager, OursLinear

BERT = {"hidden": 768, "vocabulary": 30522}
PEERS = (ThreeGemms(), OursLinear(), Eager(), *others.LINEAR)


@pytest.mark.contest(cases=(LinearCase(1024, **BERT),), peers=(*PEERS, Compiled()))
def test_dense(measure):
    measure()


@pytest.mark.contest(cases=(LinearCase(154, **BERT),), peers=(*PEERS, Compiled()), quick=True)
def test_sparse_mlm(measure):
    """15% of 1024 positions have labels, gathered before the decoder."""
    measure()


@pytest.mark.contest(cases=(LinearCase(32, **BERT, dtype="bf16"),), peers=PEERS)
def test_bf16(measure):
    """Small: without native bfloat16 a CPU multiplies it several times slower than float32."""
    measure()
