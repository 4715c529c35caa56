"""How time and memory grow, and what Group DRO costs on top of the plain mean."""

import pytest
import torch

from benchmarks.growth import cases


@pytest.mark.parametrize("case", cases(torch.get_num_threads()), ids=lambda case: case.name)
def test_growth(request, bench, case):
    if request.config.getoption("quick"):
        pytest.skip("not among the headline cases")
    with case.setting():
        bench.interleave(case, case.peers)
