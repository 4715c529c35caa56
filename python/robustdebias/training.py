"""The fine-tuning loop: one run, and going on after an interruption to the same numbers.

A step is a pure function of its number and the state in the checkpoint: data order, masks and dropout draw
from seeds derived from (seed, step or epoch), never from a generator that an evaluation or a kill could move.
So a resumed run ends in the same bits as an uninterrupted one (same machine, same number of threads).
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import rd_kernels as rd
from robustdebias.checkpoint import RunDirectory
from robustdebias.collate import Encoded, MLMCollator, encode
from robustdebias.config import TrainConfig
from robustdebias.corpus import OTHER, Example
from robustdebias.dropout import with_dropout
from robustdebias.groups import GroupAnnotator, group_mask
from robustdebias.interrupts import Interrupted, stop_signals
from robustdebias.losses import Rows, build_loss
from robustdebias.modeling import HeadInputs, check_length, fingerprint, has_adapter, masked_lm_inputs
from robustdebias.sampling import BatchStream, derived_seed

if TYPE_CHECKING:
    from robustdebias.augmentation import Swapper

__all__ = ["train"]


def train(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    train_examples: Sequence[Example],
    group_names: Sequence[str],
    out_dir: str | Path,
    *,
    annotator: GroupAnnotator | None = None,
    swapper: Swapper | None = None,
    evaluate: Callable[[nn.Module], dict[str, Any]] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    notes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune ``model`` in place and save it to ``out_dir/model``.

    Args:
        train_examples: with their groups, all of which stand in ``group_names``.
        annotator: finds the tokens that name a group; needed for token-level groups. With ``cda`` it also finds the
            groups of counterfactuals, which otherwise have their originals' labels.
        swapper: makes the counterfactuals; needed for ``cda``.
        evaluate: called in eval mode every ``eval_every`` steps; what it returns is recorded.
        resume: go on with the interrupted run in ``out_dir``; a finished one is read, not repeated.
        overwrite: replace the run in ``out_dir``.
        notes: kept in ``config.json``; a resumed run must have the same (the model's name, the corpus).

    Returns: ``config``; ``history``, one record a step (loss, group_loss of the
    groups present, group_weight, ...); ``train_seconds`` spent in steps; ``tokens_per_second``.

    Raises:
        ValueError: no examples, a group without any, a directory that is not free; before anything is written.
        Interrupted: after SIGINT or SIGTERM, when the state has been saved.
        RuntimeError: the loss is not finite.
    """
    token_level = config.group_level == "token"
    if token_level and annotator is None:
        raise ValueError("group_level: 'token' needs lexicons; ready-made labels belong to whole texts")
    if config.cda and swapper is None:
        raise ValueError("cda: needs a swapper, which makes the counterfactuals")
    check_length(model, config.max_length)
    everywhere = OTHER if token_level else None
    membership = _membership(train_examples, group_names, everywhere)
    config = config.resolved(math.ceil(len(train_examples) / config.batch_size))
    counterfactuals = None
    if config.cda and swapper is not None:  # for as many steps as without
        train_examples, group_names, counterfactuals = _with_counterfactuals(
            train_examples, group_names, swapper, annotator, config.cda_keep, everywhere
        )
        membership = _membership(train_examples, group_names, everywhere)
    encoded = encode(train_examples, tokenizer, config.max_length, annotator if token_level else None)
    counts = membership.sum(0).tolist()
    stream = BatchStream(membership, config.batch_size, config.seed)
    total = config.max_steps or 0
    loss_fn = build_loss(config, group_names, counts, linear=has_adapter(model)).to(model.device)
    trained = with_dropout(model, config.dropout, config.attention_dropout)
    optimizer = _optimizer(model, config)
    collator = MLMCollator(
        tokenizer, list(group_names), mask_probability=config.mask_probability, whole_word=config.whole_word,
        group_level="token" if token_level else "sequence", seed=config.seed,
    )  # fmt: skip

    run = RunDirectory(out_dir)
    settings = {
        "train": asdict(config),
        "data": {"texts": len(encoded), "groups": dict(zip(group_names, counts, strict=True)),
                 "fingerprint": _fingerprint(encoded), "counterfactuals": counterfactuals},
        "start": fingerprint(model), **(notes or {}),
    }  # fmt: skip
    run.claim(settings, resume=resume, overwrite=overwrite)
    if resume and (finished := run.read_result()) is not None:
        return finished

    done, seconds, tokens = 0, 0.0, 0
    if resume and (state := run.load_checkpoint()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loss_fn.load_state_dict(state["loss"])
        done, seconds, tokens = state["step"], state["seconds"], state["tokens"]
    history = run.rewind_history(done)

    def save() -> None:
        run.save_checkpoint({
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "loss": loss_fn.state_dict(),
            "step": step, "seconds": seconds, "tokens": tokens,
        })  # fmt: skip

    devices = [model.device] if model.device.type == "cuda" else []
    with stop_signals() as received, torch.random.fork_rng(devices), _progress(done, total, config) as bar:
        for step in range(done + 1, total + 1):
            started = time.perf_counter()
            numbers = range((step - 1) * config.accumulate, step * config.accumulate)
            batches = [_batch(stream, collator, encoded, number, model.device) for number in numbers]
            record = _train_step(step, total, batches, trained, loss_fn, optimizer, config)
            seconds += time.perf_counter() - started
            tokens += sum(int(batch["attention_mask"].sum()) for batch in batches)
            if evaluate is not None and config.eval_every and step % config.eval_every == 0:
                model.eval()
                record["evaluation"] = evaluate(model)
            run.append_history(record)
            history.append(record)
            _show(bar, record)
            if received:
                save()
                raise Interrupted(received[0], step, run.path)
            if config.save_every and step % config.save_every == 0 and step < total:
                save()

    model.eval()
    run.save_model(model, tokenizer)
    result = {
        "config": settings,
        "history": history,
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    run.write_result(result)
    return result


def _train_step(
    step: int,
    total: int,
    batches: list[dict[str, Tensor]],
    model: Any,
    loss_fn: Any,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> dict[str, Any]:
    """One optimizer step over ``accumulate`` batches; returns its record for the history."""

    def apply(k: int, function: Callable[[HeadInputs], Any]) -> Any:
        # Whoever runs a batch twice gets the same dropout masks twice.
        torch.manual_seed(derived_seed(config.seed, "dropout", step, k))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.bf16):
            return function(masked_lm_inputs(model, batches[k]))

    for group in optimizer.param_groups:
        group["lr"] = config.lr * _schedule(step, total, config.warmup)
    model.train()
    if config.accumulation == "exact" and len(batches) > 1:
        losses = loss_fn.window([Rows.of(batch) for batch in batches], apply)
    else:
        each = partial(loss_fn, share=1 / len(batches))
        losses = (apply(k, each) for k in range(len(batches)))
    objective, reports = 0.0, []
    for loss in losses:
        loss.backward()
        objective += loss.item()
        reports.append(loss_fn.report())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
    if not math.isfinite(objective) or not math.isfinite(norm):
        raise RuntimeError(
            f"step {step}: the loss is {objective}, the gradient's norm {norm}; "
            "the run was stopped before it spoilt the weights (a lower lr may help)"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = _means(reports)
    return {
        "step": step,
        "loss": means.pop(None, (0.0, 0))[0],
        "objective": objective,
        "group_loss": {name: loss for name, (loss, _) in means.items()},
        "group_count": {name: count for name, (_, count) in means.items()},
        "group_weight": loss_fn.weights_of(reports),
        "grad_norm": norm,
        "lr": optimizer.param_groups[0]["lr"],
    }


def _means(reports: Sequence[rd.GroupReport]) -> dict[str | None, tuple[float, int]]:
    """Mean loss and count over all batches of a step, of the groups present and, under None, of all rows."""
    rows: dict[str | None, list[tuple[float, int]]] = {}
    for report in reports:
        for name, stats in [(None, report.overall), *report.by_group.items()]:
            if stats.count:
                rows.setdefault(name, []).append((stats.loss * stats.count, stats.count))
    counts = {name: sum(count for _, count in parts) for name, parts in rows.items()}
    return {
        name: (sum(loss for loss, _ in parts) / counts[name], counts[name]) for name, parts in rows.items()
    }


def _schedule(step: int, total: int, warmup: float) -> float:
    """Share of the learning rate in step 1..total: up over the first ``warmup`` of them, then down to 0."""
    rising = warmup * total
    return min(step / rising if rising else 1.0, (total - step + 1) / max(total - rising, 1.0), 1.0)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.dim() >= 2]  # neither biases nor LayerNorms
    plain = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, fused=True)


def _membership(examples: Sequence[Example], group_names: Sequence[str], everywhere: str | None) -> Tensor:
    """[N, G] bool; ``everywhere`` names a group that every text has tokens in.

    Raises ValueError for no examples, an example without groups, a group without examples.
    """
    if not examples:
        raise ValueError("train_examples: there are none")
    if any(not example.groups for example in examples):
        raise ValueError("train_examples: every text needs its groups; annotate them first")
    membership = group_mask([example.groups or () for example in examples], group_names)
    if everywhere is not None and everywhere in group_names:
        membership[:, list(group_names).index(everywhere)] = True
    empty = [
        name for name, present in zip(group_names, membership.any(0).tolist(), strict=True) if not present
    ]
    if empty:
        raise ValueError(f"group_names: no training text is in {', '.join(empty)}")
    return membership


@dataclass(frozen=True)
class _Labels:
    """An annotator that knows the groups of a run: small ones are folded, some may be intersections."""

    annotator: GroupAnnotator
    names: Sequence[str]

    def annotate(self, text: str) -> tuple[str, ...]:
        """Of "gender:female", "religion:muslim" and "gender:female x religion:muslim" the last, where it is a group."""
        mentioned = set(self.annotator.annotate(text))
        parts = {name: set(name.split(" x ")) for name in self.names}
        found = [name for name in self.names if parts[name] <= mentioned]
        return tuple(name for name in found if not any(parts[name] < parts[other] for other in found)) or (
            OTHER,
        )


def _with_counterfactuals(
    examples: Sequence[Example],
    group_names: Sequence[str],
    swapper: Swapper,
    annotator: GroupAnnotator | None,
    keep: str,
    everywhere: str | None,
) -> tuple[list[Example], list[str], dict[str, Any]]:
    """Pairs of texts, their groups, counts. A group is gone if all its texts are: warns, "other" excepted."""
    from robustdebias.augmentation import augment

    # In one order, so that groups of the same origin are the same tuple.
    examples = [
        replace(example, groups=tuple(name for name in group_names if name in (example.groups or ())))
        for example in examples
    ]
    labels: Any = annotator and _Labels(annotator, group_names)
    if labels and (strange := sum(labels.annotate(example.text) != example.groups for example in examples)):
        warnings.warn(
            f"cda: the groups of {strange} of {len(examples)} texts are not those of the words in them, so their "
            "counterfactuals have the same groups as they",
            stacklevel=3,
        )
    pairs = augment(examples, swapper, annotator=labels, keep=cast(Literal["augmented", "all"], keep))
    present = {everywhere, *(name for pair in pairs.examples for name in pair.groups or ())}
    names = [name for name in dict.fromkeys([*group_names, OTHER]) if name in present]
    if gone := [name for name in group_names if name not in present and name != OTHER]:
        warnings.warn(f"cda: none of their texts has a counterfactual: {', '.join(gone)}", stacklevel=3)
    counts = {"texts": pairs.texts, "augmented": pairs.augmented, "swaps": pairs.swaps, "left": pairs.left}
    return pairs.examples, names, counts


def _fingerprint(encoded: Sequence[Encoded]) -> str:
    """Tells whether a resumed run has the text, tokenizer and groups that it was started with."""
    digest = hashlib.blake2b(digest_size=16)
    for sequence in encoded:
        digest.update(sequence.input_ids.tobytes())
        digest.update(repr((sequence.groups, sequence.mentions)).encode())
    return digest.hexdigest()


def _batch(
    stream: BatchStream, collator: MLMCollator, encoded: Sequence[Encoded], number: int, device: torch.device
) -> dict[str, Tensor]:
    epoch, indices = stream.batch(number)
    tensors = collator([encoded[index] for index in indices], epoch)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _progress(done: int, total: int, config: TrainConfig) -> Any:
    # Where nobody watches, a line now and then is enough.
    interval = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(
        total=total,
        initial=done,
        desc=config.objective,
        unit="step",
        mininterval=interval,
        maxinterval=2 * interval,
    )


def _show(bar: Any, record: dict[str, Any]) -> None:
    postfix = {"loss": f"{record['loss']:.3f}"}
    if record["group_loss"]:
        worst = max(record["group_loss"], key=record["group_loss"].__getitem__)
        postfix["worst"] = f"{worst} {record['group_loss'][worst]:.3f}"
    bar.set_postfix(postfix, refresh=False)
    bar.update()
