"""A whole fine-tuning step on the CPU: BERT-base, the demo's MiniLM and a tiny BERT, 128 tokens, 15% labelled."""

from dataclasses import replace

import pytest

from benchmarks.finetuning import (
    OursTraining,
    StepCase,
    Transformers,
    TransformersCompiled,
    TransformersGathered,
)

BASE = StepCase("BERT-base", layers=12, width=768, heads=12, rows=8)
MINILM = StepCase("MiniLM", layers=6, width=384, heads=12, rows=8)
TINY = StepCase("BERT-tiny", layers=2, width=128, heads=2, rows=16)
PEERS = (OursTraining(), Transformers(), TransformersGathered())


@pytest.mark.contest(cases=(TINY, MINILM, BASE), peers=PEERS)
def test_forward_backward(measure):
    measure()


@pytest.mark.contest(
    cases=[replace(case, optimizer=True) for case in (TINY, MINILM)], peers=(*PEERS, TransformersCompiled())
)
def test_training_step(measure):
    measure()


@pytest.mark.contest(cases=(replace(BASE, optimizer=True),), peers=PEERS)
def test_training_step_of_bert_base(measure):
    """Not compiled: that alone takes minutes."""
    measure()
