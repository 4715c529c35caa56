"""The losses inside torch's machinery: compile, autocast, checkpointing, torch.func, copies and dtypes.

docs/integration.md says what works with what; each of its claims is a test of this file or of one it names.
"""

import copy
import io
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rd_kernels as rd

FORMS = pytest.mark.parametrize("form", ["logits", "linear"])
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
STEP = 0.5
ROWS, WIDTH, CLASSES, GROUPS = 12, 6, 11, 3


class Model(torch.nn.Module):
    """A layer, a decoder and one of the losses."""

    def __init__(self, form: str, backend: str = "auto", **options):
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH)
        self.decoder = torch.nn.Linear(WIDTH, CLASSES, bias=False)
        if form == "cross-entropy":
            self.loss_fn = rd.CrossEntropyLoss(backend=backend)
        else:
            module = rd.GroupDROLoss if form == "logits" else rd.LinearGroupDROLoss
            self.loss_fn = module(GROUPS, rd.GroupDRO(STEP), backend=backend, **options)
        self.form = form

    def forward(self, x, labels, groups):
        hidden = torch.tanh(self.layer(x))
        if self.form == "linear":
            return self.loss_fn(hidden, self.decoder.weight, labels, groups)
        logits = self.decoder(hidden)
        return (
            self.loss_fn(logits, labels)
            if self.form == "cross-entropy"
            else self.loss_fn(logits, labels, groups)
        )

    @property
    def q(self):
        return self.loss_fn.group_weights


def batch(rows=ROWS):
    labels = torch.randint(CLASSES, (rows,))
    labels[:3] = -100
    return torch.randn(rows, WIDTH), labels, torch.randint(-1, GROUPS, (rows,))


def train(model, run, batches):
    """SGD -> the losses; parameters and q are the model's."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for data in batches:
        loss = run(*data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_same_training(found, expected, **tolerance):
    """Losses, parameters and q of two trainings."""
    (model, losses), (right, right_losses) = found, expected
    torch.testing.assert_close(losses, right_losses, **tolerance)
    saved = model.state_dict()  # with a process group also its size
    for name, other in right.state_dict().items():
        torch.testing.assert_close(
            saved[name], other, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


class Counted:
    """The torch.compile backend that changes nothing; counts its compilations."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


@pytest.mark.parametrize("form", ["logits", "linear", "cross-entropy"])
def test_compiled_training_is_eager_training(backend, form):
    """fullgraph: no graph break; every gradient goes through a step of the optimizer, q through several updates."""
    torch._dynamo.reset()
    eager = Model(form, backend)
    compiled = copy.deepcopy(eager)
    data = [batch() for _ in range(3)]
    tracer = Counted()  # inductor's code is tested for cpu and reference in test_ops.py
    losses = train(compiled, torch.compile(compiled, fullgraph=True, backend=tracer), data)
    assert tracer.graphs == 1
    assert_same_training((compiled, losses), (eager, train(eager, eager, data)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["logits", "linear", "cross-entropy"])
def test_compiled_by_inductor(form):
    torch._dynamo.reset()
    eager = Model(form)
    compiled = copy.deepcopy(eager)
    data = [batch() for _ in range(3)]
    losses = train(compiled, torch.compile(compiled, fullgraph=True), data)
    assert_same_training((compiled, losses), (eager, train(eager, eager, data)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["logits", "linear", "cross-entropy"])
def test_dynamic_rows_compile_once(form):
    torch._dynamo.reset()
    eager = Model(form)
    compiled = copy.deepcopy(eager)
    data = [batch(rows) for rows in (7, 12, 29, 64)]
    tracer = Counted()
    losses = train(compiled, torch.compile(compiled, fullgraph=True, dynamic=True, backend=tracer), data)
    assert tracer.graphs == 1
    assert_same_training((compiled, losses), (eager, train(eager, eager, data)), rtol=1e-5, atol=1e-6)


def test_stateless_compiled_functions_compile_once_for_all_numbers_of_groups():
    torch._dynamo.reset()
    tracer = Counted()
    run = torch.compile(rd.functional.group_dro_cross_entropy, fullgraph=True, dynamic=True, backend=tracer)
    for num_groups in (3, 4, 9):
        (_, labels, groups), logits = batch(), torch.randn(ROWS, CLASSES)
        q = torch.full((num_groups,), 1 / num_groups)
        other = q.clone()
        loss = run(logits, labels, groups, q)
        torch.testing.assert_close(loss, rd.functional.group_dro_cross_entropy(logits, labels, groups, other))
        torch.testing.assert_close(q, other)
    assert tracer.graphs == 1


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(form, dtype):
    """The loss is float32, gradients keep their parameters' dtype, q stays float32."""
    model, data = Model(form), batch()
    exact = copy.deepcopy(model).double()
    with torch.autocast("cpu", dtype):
        loss = model(*data)
    assert loss.dtype == model.q.dtype == torch.float32
    loss.backward()
    truth = exact(data[0].double(), *data[1:])
    truth.backward()
    # A few roundings of activations, logits and gradients to 16 bits.
    bound = 8 * torch.finfo(dtype).eps
    assert abs(loss.item() - truth.item()) <= bound * truth.item()
    for own, right in zip(model.parameters(), exact.parameters(), strict=True):
        assert own.grad.dtype == torch.float32
        assert (own.grad - right.grad).norm() <= bound * right.grad.norm()


@FORMS
def test_a_scaled_loss_scales_the_gradients_exactly(backend, form):
    """What GradScaler relies on: a power of two changes no digit."""
    plain = Model(form, backend)
    scaled, data = copy.deepcopy(plain), batch()
    plain(*data).backward()
    (scaled(*data) * 65536).backward()
    for own, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(own.grad * 65536, other.grad)
    assert torch.equal(plain.q, scaled.q)


@FORMS
def test_grad_scaler_trains_in_float16(form):
    model = Model(form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data, losses = batch(), []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(*data)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 1024
    assert losses[-1] < losses[0]


@FORMS
def test_a_step_that_the_scaler_skips_has_updated_q_with_its_finite_losses(form):
    """The losses were fine, only the scaled gradients overflowed: q has seen the batch, the parameters have not."""
    model = Model(form)
    reference, data = copy.deepcopy(model), batch()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with torch.autocast("cpu", torch.float16):
        loss = model(*data)
        expected = reference(*data)
    assert loss.isfinite()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(model.q, reference.q)
    assert not torch.equal(model.q, torch.full((GROUPS,), 1 / GROUPS))
    assert expected.isfinite()


@FORMS
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_batch_whose_loss_is_not_finite_is_skipped_and_q_kept(backend, form, value):
    model, (x, labels, groups) = Model(form, backend), batch()
    model(x, labels, groups)
    kept = model.q.clone()
    before = copy.deepcopy(dict(model.named_parameters()))
    x[5], labels[5], groups[5] = value, 1, 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    loss = model(x * torch.tensor([0.0, *[1.0] * (WIDTH - 1)]), labels, groups)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert not loss.isfinite()
    assert torch.equal(model.q, kept)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


OBJECTIVES = [
    rd.ERM(),
    rd.GroupDRO(STEP),
    rd.GroupDRO(STEP, adjustment=2.0, group_counts=[5, 50, 500]),
    rd.GroupDRO(STEP, absent_groups="hold"),
]


@FORMS
@REENTRANT
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["erm", "dro", "adjusted", "hold"])
def test_the_loss_inside_a_checkpointed_function(backend, form, reentrant, objective):
    """Its forward runs twice and steps q once; loss, gradients and q have the bits of a run without checkpointing."""
    plain = Model(form, backend)
    plain.loss_fn = type(plain.loss_fn)(GROUPS, objective, backend=backend)
    checked = copy.deepcopy(plain)
    for _ in range(2):
        x, *rest = batch()
        x.requires_grad_()  # reentrant checkpointing needs an input with a gradient
        loss = plain(x, *rest)
        loss.backward()
        found = checkpoint(checked, x, *rest, use_reentrant=reentrant)
        found.backward()
        assert torch.equal(found, loss)
        assert torch.equal(checked.q, plain.q)
        assert str(checked.loss_fn.report()) == str(plain.loss_fn.report())
    for own, right in zip(checked.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.grad, right.grad)


@REENTRANT
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("labels", ["of two batches", "the same"])
def test_two_checkpointed_forwards_before_two_backwards_are_refused(reentrant, order, labels):
    """The first forward's weights are gone; and with the same labels it would not be known which forward is meant."""
    model, data = Model("logits"), [batch(), batch()]
    if labels == "the same":
        data[1] = (data[1][0], *data[0][1:])
    losses = [checkpoint(model, x.requires_grad_(), *rest, use_reentrant=reentrant) for x, *rest in data]
    q = model.q.clone()
    with pytest.raises(RuntimeError, match="activation checkpointing runs this GroupDROLoss again"):
        [losses[index].backward() for index in order]
    assert torch.equal(model.q, q)


@REENTRANT
def test_labels_made_inside_the_checkpointed_function_are_refused(reentrant):
    model, (x, labels, groups) = Model("logits"), batch()
    loss = checkpoint(
        lambda x, labels: model(x, labels + 0, groups), x.requires_grad_(), labels, use_reentrant=reentrant
    )
    with pytest.raises(RuntimeError, match="are made inside the checkpointed function"):
        loss.backward()


def test_other_calls_between_a_checkpointed_forward_and_its_backward():
    """They step q, and the checkpointed call's gradient is that of its own q."""
    plain = Model("logits")
    checked, (first, second) = copy.deepcopy(plain), (batch(), batch())
    plain(*first).backward()
    plain(*second)
    loss = checkpoint(checked, *first, use_reentrant=False)
    checked(*second)
    checked.eval()(*second)
    checked.train()
    loss.backward()
    assert torch.equal(checked.q, plain.q)
    for own, right in zip(checked.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.grad, right.grad)


def test_the_loss_outside_a_checkpointed_model(backend):
    """Works with several forwards before the backwards."""
    plain = Model("logits", backend)
    checked, data = copy.deepcopy(plain), [batch(), batch()]
    sum(plain(*each) for each in data).backward()
    losses = []
    for x, labels, groups in data:
        logits = checkpoint(lambda x: checked.decoder(checked.layer(x).tanh()), x, use_reentrant=False)
        losses.append(checked.loss_fn(logits, labels, groups))
    sum(losses).backward()
    for own, right in zip(checked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, right.grad)
    assert torch.equal(checked.q, plain.q)


def test_checkpointing_in_eval_mode_leaves_q_alone():
    model, data = Model("logits").eval(), batch()
    checkpoint(model, *data, use_reentrant=False).backward()
    assert torch.equal(model.q, torch.full((GROUPS,), 1 / GROUPS))


@FORMS
def test_functional_call(backend, form):
    """The state given is the state used and updated; the module's own stays."""
    model, data = Model(form, backend), batch()
    other = copy.deepcopy(model)
    state = {name: torch.rand_like(tensor).requires_grad_() for name, tensor in model.named_parameters()}
    q = torch.tensor([0.5, 0.3, 0.2])
    loss = torch.func.functional_call(model, {**state, "loss_fn.group_weights": q}, data)
    gradients = torch.autograd.grad(loss, list(state.values()))
    other.load_state_dict({**state, "loss_fn.group_weights": torch.tensor([0.5, 0.3, 0.2])})
    expected = other(*data)
    assert torch.equal(loss, expected)
    assert torch.equal(q, other.q)
    for own, right in zip(gradients, torch.autograd.grad(expected, list(other.parameters())), strict=True):
        assert torch.equal(own, right)
    assert torch.equal(model.q, torch.full((GROUPS,), 1 / GROUPS))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
}


@pytest.mark.parametrize("form", ["logits", "linear", "cross-entropy"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_transforms_are_refused_by_name(backend, form, transform):
    model, (x, labels, groups) = Model(form, backend), batch()
    with pytest.raises(
        RuntimeError, match=r"losses do not support torch.func transforms .* use torch.autograd.grad"
    ):
        TRANSFORMS[transform](lambda x: model(x, labels, groups), x)
    if form != "cross-entropy":
        assert torch.equal(model.q, torch.full((GROUPS,), 1 / GROUPS))


def test_vmap_over_labels_is_refused_by_name(backend):
    hidden, weight, groups = torch.randn(5, 4), torch.randn(7, 4), torch.zeros(5, dtype=torch.int64)
    q = torch.ones(1)

    def loss(labels):
        return rd.functional.linear_group_dro_cross_entropy(
            hidden, weight, labels, groups, q, backend=backend
        )

    with pytest.raises(RuntimeError, match=r"losses do not support torch\.func transforms"):
        torch.func.vmap(loss)(torch.randint(7, (3, 5)))


@pytest.mark.parametrize("form", ["logits", "linear", "cross-entropy"])
def test_forward_mode_is_refused_by_name(backend, form):
    model, (x, *rest) = Model(form, backend), batch()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="losses have no forward-mode derivative"):
        model(forward_ad.make_dual(x, x), *rest)
    if form != "cross-entropy":
        assert torch.equal(model.q, torch.full((GROUPS,), 1 / GROUPS))


@pytest.mark.parametrize("form", ["logits", "linear", "cross-entropy"])
def test_second_derivatives_and_batched_backwards_are_refused_by_name(backend, form):
    model, (x, *rest) = Model(form, backend), batch()
    loss = model(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="losses have no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="losses have no batched backward"):
        torch.autograd.grad(loss, x, torch.ones(2), is_grads_batched=True)


@FORMS
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_a_copy_made_in_mid_training_goes_on_with_the_same_bits(form, how):
    model, data = Model(form), [batch() for _ in range(4)]
    train(model, lambda *each: checkpoint(model, *each, use_reentrant=False), data[:2])
    if how == "deepcopy":
        restored = copy.deepcopy(model)
    elif how == "pickle":
        restored = pickle.loads(pickle.dumps(model))
    else:
        buffer, whole = io.BytesIO(), how == "torch.save"
        torch.save(model if whole else model.state_dict(), buffer)
        buffer.seek(0)
        restored = torch.load(buffer, weights_only=not whole)
        if not whole:
            state, restored = restored, Model(form)
            restored.load_state_dict(state)
    assert restored.loss_fn._first_run is None
    if how != "state_dict":
        assert str(restored.loss_fn.report()) == str(model.loss_fn.report())
    found, expected = train(restored, restored, data[2:]), train(model, model, data[2:])
    assert_same_training((restored, found), (model, expected), rtol=0, atol=0)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_group_weights_stay_float32_whatever_the_model_is_cast_to(cast):
    objective = rd.GroupDRO(STEP, adjustment=2.0, group_counts=[5, 50, 500])
    loss_fn = rd.GroupDROLoss(GROUPS, objective)
    _, labels, groups = batch()
    logits = torch.randn(ROWS, CLASSES)
    loss_fn(logits, labels, groups)
    q, adjustment = loss_fn.group_weights.clone(), loss_fn.adjustment.clone()
    model = torch.nn.Sequential(loss_fn, torch.nn.Linear(2, 2))
    model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    assert model[1].weight.dtype != torch.float32
    assert torch.equal(loss_fn.group_weights, q)  # not rounded on the way
    assert torch.equal(loss_fn.adjustment, adjustment)
    assert loss_fn.group_weights is loss_fn.state_dict(keep_vars=True)["group_weights"]
    assert loss_fn(logits.bfloat16(), labels, groups).isfinite()


def test_a_cast_moves_to_the_device_too():
    loss_fn = rd.GroupDROLoss(GROUPS).to("meta", torch.bfloat16)
    assert loss_fn.group_weights.device.type == "meta"
    assert loss_fn.group_weights.dtype == torch.float32


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_group_weights_are_float32_whatever_the_default_dtype(default):
    """transformers builds models with the default dtype set to their own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        loss_fn = rd.GroupDROLoss(GROUPS)
    finally:
        torch.set_default_dtype(before)
    assert loss_fn.group_weights.dtype == torch.float32


@FORMS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, form, mode):
    """The same loss; training mode steps q all the same, eval mode does not; training goes on afterwards."""
    model, data = Model(form, backend), batch()
    reference = copy.deepcopy(model)
    with mode():
        loss = model.eval()(*data)
        assert torch.equal(model.q, reference.q)
        assert torch.equal(model.train()(*data), loss)
    assert torch.equal(reference(*data), loss)
    assert torch.equal(model.q, reference.q)
    assert not loss.requires_grad
    assert str(model.loss_fn.report()) == str(reference.loss_fn.report())
    second = batch()
    model(*second).backward()
    reference(*second)
    assert torch.equal(model.q, reference.q)


@pytest.fixture
def single_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@FORMS
def test_the_loss_inside_distributed_data_parallel(form, single_rank):
    """DDP broadcasts rank 0's buffers before each forward; q, the same on all ranks, survives that."""
    plain = Model(form)
    wrapped, data = copy.deepcopy(plain), [batch() for _ in range(3)]
    wrapped.loss_fn.process_group = single_rank
    ddp = torch.nn.parallel.DistributedDataParallel(wrapped)
    found, expected = train(wrapped, ddp, data), train(plain, plain, data)
    assert_same_training((wrapped, found), (plain, expected), rtol=1e-6, atol=1e-7)
