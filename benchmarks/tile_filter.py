"""How much of the linear op's backward the tile filter leaves out, counted on a real model's outputs; nothing is timed.

The demo's model predicts masked tokens of the demo's news articles (`make demo` fetches both). Tiles are live as
TritonGEMM.live_tiles decides for the row weights. The vocabulary stands in its own order, or by mean logit over earlier
rows than those that are counted; rows stand as in the texts, or sorted by group. A live share f makes the op cost
1 + 2 f GEMMs, the forward and f of the two of the backward, instead of 3.

    python -m benchmarks.tile_filter --out FILE
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from rd_kernels.backends.triton_gemm import GEMMTiles, TritonGEMM
from rd_kernels.linear import mean_logit_order
from robustdebias import modeling
from robustdebias.collate import MLMCollator, encode
from robustdebias.corpus import Example
from robustdebias.demo import HEAD_FILE
from robustdebias.demo_assets import fetch

ROWS = 2048
EARLIER_ROWS = 1024  # from which the order of the vocabulary is taken
EPSILONS = {"0": 0.0, "2^-16": 2.0**-16, "2^-12": 2.0**-12, "2^-9": 2.0**-9, "1e-2": 1e-2}
GROUPS = 8
# The groups' shares of the loss: equal, or as Group DRO leaves them where two groups are the worst by far.
SHARES = {"uniform": [1 / 8] * 8, "group dro": [0.47, 0.47, *[0.01] * 6]}
PASSAGES = 32  # to a batch


def outputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> hidden [N, D] of masked positions, weight [V, D], bias [V], labels [N], groups [N]: each article is in one."""
    assets = fetch()
    model, tokenizer = modeling.load(assets.model_dir, HEAD_FILE)
    model.eval()
    with open(assets.corpus, encoding="utf-8") as file:
        texts = [json.loads(line)[assets.corpus_field] for line in file]
    names = [str(group) for group in range(GROUPS)]
    examples = [
        Example(text, str(i), (names[i % GROUPS],)) for i, text in enumerate(texts) if len(text) > 200
    ]
    collate = MLMCollator(tokenizer, names)
    parts: list[modeling.HeadInputs] = []
    for start in range(0, len(examples), PASSAGES):
        batch = examples[start : start + PASSAGES]
        with torch.no_grad():
            parts.append(modeling.masked_lm_inputs(model, collate(encode(batch, tokenizer, 64))))
        if sum(len(part.labels) for part in parts) >= EARLIER_ROWS + ROWS:
            break
    hidden, labels, groups = (
        torch.cat([getattr(part, name) for part in parts])[: EARLIER_ROWS + ROWS]
        for name in ("hidden", "labels", "groups")
    )
    weight, bias = parts[0].weight, parts[0].bias
    assert weight is not None
    assert bias is not None
    return hidden, weight.detach(), bias.detach(), labels, groups.int().argmax(1)


def exponentials(logits: Tensor, labels: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """What TritonGEMM.exponentials makes of logits [N, V] -> E [N, V] in bfloat16, tile_sums [T, N], factor [N]."""
    at = labels[:, None]
    e = (logits - logits.gather(1, at)).exp()
    tiles = torch.nn.functional.pad(e, (0, -e.shape[1] % columns)).unflatten(1, (-1, columns)).sum(2)
    s = e.sum(1, keepdim=True)
    return e.scatter(1, at, 1 - s).bfloat16(), tiles.t().contiguous(), 1 / s[:, 0]


def count() -> list[dict[str, object]]:
    hidden, weight, bias, labels, groups = outputs()
    hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()
    by_mean = mean_logit_order(hidden[:EARLIER_ROWS], weight, bias)
    hidden, labels, groups = hidden[EARLIER_ROWS:], labels[EARLIER_ROWS:], groups[EARLIER_ROWS:]
    gemm = TritonGEMM()
    results: list[dict[str, object]] = []
    for vocabulary, row_order in itertools.product(("own order", "mean logit"), ("text", "group")):
        order = by_mean if vocabulary == "mean logit" else torch.arange(len(weight))
        rows = groups.argsort(stable=True) if row_order == "group" else torch.arange(ROWS)
        logits = hidden[rows] @ weight[order].t() + bias[order]
        place = order.argsort()[labels[rows]]
        for columns in (128, 256):
            gemm.gemm_tiles = lambda device, columns=columns: GEMMTiles(columns=columns)  # type: ignore[method-assign]
            e, tile_sums, factor = exponentials(logits, place, columns)
            for weights, shares in SHARES.items():
                scale = (torch.tensor(shares) / groups.bincount(minlength=GROUPS))[groups[rows]] * factor
                for name, eps in EPSILONS.items():
                    live = gemm.live_tiles(tile_sums, place, scale, e, eps).float().mean().item()
                    results.append(
                        {
                            "vocabulary": vocabulary,
                            "rows": row_order,
                            "columns": columns,
                            "weights": weights,
                            "eps": name,
                            "live": round(live, 4),
                            "gemms": round(1 + 2 * live, 3),
                        }
                    )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tile_filter", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON with the counts")
    out = parser.parse_args().out
    results = count()
    for cells in [list(results[0]), *(list(result.values()) for result in results)]:
        print("".join(f"{cell!s:>12}" for cell in cells))
    about = {
        "what": "share of tiles that are live, and the op's cost in GEMMs: 1 + 2 live, instead of 3",
        "model": "the demo's MiniLM, D = 384, V = 30522, operands in bfloat16",
        "rows": f"{ROWS} masked tokens of the demo's news articles, in {GROUPS} groups by article",
        "tile_rows": GEMMTiles().rows,
        "torch": torch.__version__,
    }
    lines = ",\n".join(f"  {json.dumps(result)}" for result in results)
    out.write_text(json.dumps(about, indent=1)[:-2] + ',\n "results": [\n' + lines + "\n ]\n}\n")


if __name__ == "__main__":
    main()
