"""torch's machinery on a GPU: graphs of a whole training step, torch.compile, GradScaler, checkpointing."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rd_kernels as rd
from tests.gpu.problems import STEP, assert_same_bits

pytestmark = pytest.mark.gpu

FORMS = pytest.mark.parametrize("form", ["logits", "linear"])
ROWS, WIDTH, CLASSES, GROUPS = 257, 64, 3001, 4


class Model(torch.nn.Module):
    """A layer, a decoder and one of the losses."""

    def __init__(self, form, backend):
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH)
        self.decoder = torch.nn.Linear(WIDTH, CLASSES, bias=False)
        module = rd.GroupDROLoss if form == "logits" else rd.LinearGroupDROLoss
        self.loss_fn = module(GROUPS, rd.GroupDRO(STEP), backend=backend)
        self.form = form

    def forward(self, x, labels, groups):
        hidden = torch.tanh(self.layer(x))
        if self.form == "linear":
            return self.loss_fn(hidden, self.decoder.weight, labels, groups)
        return self.loss_fn(self.decoder(hidden), labels, groups)


def batch(rows=ROWS):
    labels = torch.randint(CLASSES, (rows,))
    labels[1::7] = -100
    return torch.randn(rows, WIDTH), labels, torch.randint(-1, GROUPS, (rows,))


def training_step(model, optimizer, run, data):
    optimizer.zero_grad(set_to_none=False)
    loss = run(*data)
    loss.backward()
    optimizer.step()
    return loss.detach()


def make(form, backend):
    model = Model(form, backend)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@FORMS
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_graph_of_forward_backward_and_optimizer_step(backend, form, checkpointed):
    """Replayed with new data it trains as eager does: the losses, the parameters, and q, one step a replay."""
    model, optimizer = make(form, backend)
    reference = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    inputs, stream = [tensor.clone() for tensor in batch()], torch.cuda.Stream()

    def run(*data):
        # The generator's state cannot be read while capturing; nothing here draws from it.
        return checkpoint(model, *data, use_reentrant=False, preserve_rng_state=False)

    run = run if checkpointed else model
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles what is compiled on first use
            training_step(model, optimizer, run, inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = training_step(model, optimizer, run, inputs)
    model.load_state_dict(start)
    eager_optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        data = batch()
        for own, new in zip(inputs, data, strict=True):
            own.copy_(new)
        graph.replay()
        expected = training_step(reference, eager_optimizer, reference, data)
        # Not the same bits: cuBLAS promises none between streams.
        found, right = [loss, *model.state_dict().values()], [expected, *reference.state_dict().values()]
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@FORMS
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_is_eager_training(backend, form, mode):
    """fullgraph, and under "reduce-overhead" as CUDA graphs: losses, parameters and q over several steps."""
    torch._dynamo.reset()
    model, optimizer = make(form, backend)
    reference = copy.deepcopy(model)
    eager_optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(4):
        data = batch()
        loss = training_step(model, optimizer, compiled, data).clone()
        expected = training_step(reference, eager_optimizer, reference, data)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for own, right in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-6)


@FORMS
def test_dynamic_rows_compile_once(backend, form):
    torch._dynamo.reset()
    model, graphs = Model(form, backend), []
    reference = copy.deepcopy(model)

    def tracer(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=tracer)
    for rows in (33, 64, 257, 1000):
        data = batch(rows)
        torch.testing.assert_close(compiled(*data), reference(*data), rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1
    torch.testing.assert_close(model.loss_fn.group_weights, reference.loss_fn.group_weights)


@FORMS
def test_grad_scaler_skips_a_step_without_harm(backend, form):
    """A scale that overflows float16 gradients: the parameters stay, q has seen the batch, training goes on."""
    model, optimizer = make(form, backend)
    before = copy.deepcopy(dict(model.named_parameters()))
    scaler, data, losses = torch.amp.GradScaler("cuda", init_scale=2.0**40), batch(), []
    uniform = model.loss_fn.group_weights.clone()
    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = model(*data)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
        if step == 0:
            assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
            assert not torch.equal(model.loss_fn.group_weights, uniform)
    assert torch.stack(losses).isfinite().all()
    assert losses[-1] < losses[0]
    torch.testing.assert_close(model.loss_fn.group_weights.sum(), torch.tensor(1.0))


@FORMS
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_the_loss_inside_a_checkpointed_function(backend, form, reentrant):
    """Recomputed in the thread that runs the backward on a GPU: one step of q, the gradients of a plain run."""
    plain, _ = make(form, backend)
    checked = copy.deepcopy(plain)
    for _ in range(2):
        x, *rest = batch()
        x.requires_grad_()
        loss = plain(x, *rest)
        loss.backward()
        found = checkpoint(checked, x, *rest, use_reentrant=reentrant)
        found.backward()
        assert_same_bits([found, checked.loss_fn.group_weights], [loss, plain.loss_fn.group_weights])
    for own, right in zip(checked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, right.grad, rtol=1e-5, atol=1e-7)


def test_two_checkpointed_forwards_before_two_backwards_are_refused(backend):
    model, data = Model("logits", backend), [batch(), batch()]
    losses = [checkpoint(model, *each, use_reentrant=False) for each in data]
    with pytest.raises(RuntimeError, match="activation checkpointing runs this GroupDROLoss again"):
        losses[0].backward()


def test_half_and_a_device_at_once_keep_q_float32(backend):
    loss_fn = rd.GroupDROLoss(GROUPS, backend=backend).cpu().to("cuda", torch.bfloat16)
    assert loss_fn.group_weights.dtype == torch.float32
    assert loss_fn.group_weights.device.type == "cuda"
    loss = loss_fn(torch.randn(8, 30, dtype=torch.bfloat16), torch.arange(8), torch.arange(8) % GROUPS)
    assert loss.isfinite()


def test_auto_on_a_gpu_says_why(backend):
    choice = rd.backends.explain(torch.randn(3, 5), backend)
    assert (choice.name, choice.reason) == (backend, "asked for by argument backend")
    choice = rd.backends.explain(torch.randn(3, 5))
    assert choice.name == "cuda" if torch.version.hip is None else "triton"
    assert choice.reason == "first in order for cuda:0 that serves float32, 3 x 5"
    double = rd.backends.explain(torch.randn(3, 5, dtype=torch.float64))
    assert double.name == "reference"
    assert "float64" in double.rejected[backend]
