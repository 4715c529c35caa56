"""CUDA graphs, several streams, several devices, no wait for the host: always the bits of an eager, serial run."""

import copy

import pytest
import torch

import rd_kernels as rd
from benchmarks.peers import Produced
from tests.gpu.problems import assert_same_bits, make_batch, make_loss, step

pytestmark = pytest.mark.gpu

MASKS = pytest.mark.parametrize("mask", [False, True], ids=["ids", "mask"])


class Graphed:
    """A step of a loss, captured once; ``replay`` copies a batch into its inputs."""

    def __init__(self, loss_fn, batch, stream):
        self.loss_fn, (logits, *rest) = loss_fn, (tensor.clone() for tensor in batch)
        self.inputs = [logits.requires_grad_(), *rest]
        before = loss_fn.group_weights.clone()
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles what is compiled on first use
                step(loss_fn, *self.inputs)
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.outputs = step(loss_fn, *self.inputs)
        loss_fn.group_weights.copy_(before)
        torch.cuda.synchronize()

    def load(self, batch):
        with torch.no_grad():
            for own, new in zip(self.inputs, batch, strict=True):
                own.copy_(new)


def batches(count, rows=257, mask=False, dtype=torch.bfloat16):
    return [make_batch(rows, 30522, dtype, mask=mask) for _ in range(count)]


def eager(loss_fn, batch):
    logits, labels, groups = batch
    loss, gradient = step(loss_fn, logits.detach().requires_grad_(), labels, groups)
    return loss, gradient, loss_fn.group_weights.clone()


@MASKS
def test_a_replayed_graph_gives_the_eager_bits(backend, mask):
    """Three replays with new inputs: q moves on with each of them, and the report is that of the last."""
    captured, *rest = batches(4, mask=mask)
    loss_fn = make_loss(backend)
    reference = copy.deepcopy(loss_fn)
    graphed = Graphed(loss_fn, captured, torch.cuda.Stream())
    for batch in rest:
        graphed.load(batch)
        graphed.graph.replay()
        found = (*graphed.outputs, loss_fn.group_weights)
        assert_same_bits(found, eager(reference, batch))
        assert str(loss_fn.report()) == str(reference.report())


def test_two_graphs_of_one_stream_replayed_on_two(backend):
    """What was captured on one stream may run at the same time later: nothing may belong to the stream."""
    stream, others = torch.cuda.Stream(), [torch.cuda.Stream() for _ in range(2)]
    data = batches(2, rows=1024)
    losses = [make_loss(backend) for _ in data]
    references = copy.deepcopy(losses)
    graphs = [Graphed(loss_fn, batch, stream) for loss_fn, batch in zip(losses, data, strict=True)]
    for _ in range(50):
        expected = [eager(*pair) for pair in zip(references, data, strict=True)]
        torch.cuda.synchronize()
        for graphed, other in zip(graphs, others, strict=True):
            with torch.cuda.stream(other):
                graphed.graph.replay()
        torch.cuda.synchronize()
        for graphed, bits in zip(graphs, expected, strict=True):
            assert_same_bits((*graphed.outputs, graphed.loss_fn.group_weights), bits)


@MASKS
def test_two_streams_at_once(backend, mask):
    """Calls of two streams, in turn and without waiting: each stream's 200 results are those of a serial run."""
    steps, data = 200, batches(2, rows=512, mask=mask)
    references = [make_loss(backend) for _ in data]
    losses = copy.deepcopy(references)

    def results(loss_fn, batch):
        """Of every step the loss and q, and at last the gradient: the others' memory goes back to their stream."""
        for number in range(steps):
            loss, gradient, q = eager(loss_fn, batch)
            yield (loss, gradient, q) if number == steps - 1 else (loss, q)

    serial = [list(results(*pair)) for pair in zip(references, data, strict=True)]
    torch.cuda.synchronize()
    streams, runs, found = [torch.cuda.Stream() for _ in data], [*map(results, losses, data)], [[], []]
    for _ in range(steps):
        for stream, run, own in zip(streams, runs, found, strict=True):
            with torch.cuda.stream(stream):
                own.append(next(run))
    torch.cuda.synchronize()
    for own, expected in zip(found, serial, strict=True):
        for bits, right in zip(own, expected, strict=True):
            assert_same_bits(bits, right)


@pytest.mark.parametrize("form", ["ids", "mask", "in place", "cross-entropy", "linear"])
def test_the_host_does_not_wait(backend, form):
    """Any synchronisation between the first kernel and the last raises here."""
    logits, labels, groups = make_batch(64, 1000, torch.float32, mask=form == "mask")
    logits.requires_grad_()
    weight = torch.randn(1000, 16, requires_grad=True)
    hidden = torch.randn(64, 16, requires_grad=True)
    loss_fn = make_loss(backend, inplace_backward=form == "in place")
    linear, plain = rd.LinearGroupDROLoss(4, backend=backend), rd.CrossEntropyLoss(backend=backend)

    def run():
        if form == "linear":
            return torch.autograd.grad(linear(hidden, weight, labels, groups), (hidden, weight))
        if form == "cross-entropy":
            return torch.autograd.grad(plain(logits, labels), logits)
        z = Produced.apply(logits) if form == "in place" else logits
        return torch.autograd.grad(loss_fn(z, labels, groups), logits)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_device_than_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (batch,) = batches(1)
    expected = eager(make_loss(backend), batch)
    loss_fn = make_loss(backend).to("cuda:1")
    found = eager(loss_fn, [tensor.to("cuda:1") for tensor in batch])
    assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 for tensor in found)
    assert_same_bits([tensor.to("cuda:0") for tensor in found], expected)
