"""What leaving out light rows and vocabulary entries wins on a real model's outputs, and what error it makes.

The demo's model predicts masked tokens of the demo's news articles; the linear op's backward is timed on its
hidden states, decoder and labels: whole, and with `filter_eps` at several values. Needs the demo's assets (`make
demo` fetches them) and is skipped without. `python -m pytest benchmarks/test_sparse_backward.py -s` prints, for each
case, the share left out and the error in norm beside the stated bound. Read ratios within a group.
"""

import json

import pytest
import torch

from rd_kernels import gemm, linear
from rd_kernels.backends.registry import get

EPSILONS = [0.0, 1e-4, 2**-9, 1e-2, 3e-2]
PASSAGES = 32  # to a batch


@pytest.fixture(scope="session")
def outputs():
    """-> hidden [2048, D] of masked positions, decoder weight [V, D], bias [V], labels [2048]."""
    modeling = pytest.importorskip("robustdebias.modeling")
    from robustdebias.collate import MLMCollator, encode
    from robustdebias.corpus import Example
    from robustdebias.demo import HEAD_FILE
    from robustdebias.demo_assets import default_cache, fetch

    if not default_cache().is_dir():
        pytest.skip(f"the demo's model and texts are not in {default_cache()}; make demo fetches them")
    assets = fetch()
    model, tokenizer = modeling.load(assets.model_dir, HEAD_FILE)
    model.eval()
    with open(assets.corpus, encoding="utf-8") as file:
        texts = [json.loads(line)[assets.corpus_field] for line in file]
    examples = [Example(text, str(i), ()) for i, text in enumerate(texts) if len(text) > 200]
    collate = MLMCollator(tokenizer, ["all"])
    parts = []
    for start in range(0, len(examples), PASSAGES):
        encoded = encode(examples[start : start + PASSAGES], tokenizer, 64)
        with torch.no_grad():
            parts.append(modeling.masked_lm_inputs(model, collate(encoded)))
        if sum(len(part.labels) for part in parts) >= 2048:
            break
    hidden, labels = (
        torch.cat([getattr(part, name) for part in parts])[:2048] for name in ("hidden", "labels")
    )
    return hidden, parts[0].weight.detach(), parts[0].bias.detach(), labels


def row_weights(kind, rows):
    """ERM's, or those of four groups of which Group DRO has all but settled on one."""
    q = {"erm": [0.25] * 4, "one group": [0.97, 0.01, 0.01, 0.01]}[kind]
    return torch.tensor(q)[torch.arange(rows) % 4] / (rows / 4)


@pytest.mark.parametrize("filter_eps", EPSILONS, ids=lambda value: f"eps{value:.0e}")
@pytest.mark.parametrize("weights", ["erm", "one group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [154, 1024])
def test_backward(benchmark, outputs, rows, dtype, weights, filter_eps):
    hidden, weight, bias = (t.to(dtype) for t in outputs[:3])
    hidden, labels, scale = hidden[:rows], outputs[3][:rows], row_weights(weights, rows)
    backend = get("cpu")
    shape = (weight.shape[0], -100, linear.Layout(rows, rows, rows))
    _, normaliser, _, kept = linear.forward(backend, hidden, weight, bias, labels, None, *shape)

    def run():
        return linear.backward(
            backend, torch.tensor(1.0), scale, kept, normaliser, hidden, weight, bias, labels, None, None, *shape,
            [True, True, True], filter_eps,
        )  # fmt: skip

    # No timing without a correctness gate: the stated bound, against float64, plus the dtype's own rounding.
    terms = torch.softmax(hidden.double() @ weight.double().t() + bias.double(), dim=1)
    terms[torch.arange(rows), labels] -= 1
    terms *= scale.double()[:, None]
    total = float(terms.abs().sum())
    grad_hidden, grad_weight, _ = run()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    report = []
    for name, value, exact, size in (
        ("dH", grad_hidden, terms @ weight.double(), weight.double().norm(dim=1).max()),
        ("dW", grad_weight, terms.t() @ hidden.double(), hidden.double().norm(dim=1).max()),
    ):
        difference = value.double() - exact
        error, bound = float(difference.norm(dim=1).sum()), filter_eps * total * float(size)
        assert error <= bound + rounding * total * float(size)
        relative = float(difference.norm() / exact.norm())
        report.append(f"{name} error {error:.1e} of bound {bound:.1e}, relative {relative:.1e}")
    del terms, exact, difference
    chosen = linear.select(kept.unweighted, labels, scale, normaliser[1], -100, filter_eps)
    left = [
        0.0 if chosen.rows is None else 1 - len(chosen.rows) / rows,
        0.0 if chosen.columns is None else 1 - len(chosen.columns) / len(weight),
    ]
    benchmark.group = f"backward N={rows} D={weight.shape[1]} V={len(weight)} {dtype} {weights}"
    benchmark.extra_info |= {"rows_left_out": left[0], "columns_left_out": left[1], "errors": report}
    if dtype == torch.bfloat16:
        benchmark.extra_info["converts"] = gemm.converts("cpu", dtype)
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    print(
        f"\n{benchmark.group} eps={filter_eps:.1e}: {benchmark.stats.stats.median * 1e3:.0f} ms, left out "
        f"{left[0]:.0%} of rows, {left[1]:.0%} of columns; {'; '.join(report)}"
    )
