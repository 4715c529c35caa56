"""The objectives of this package in the Trainer of transformers: :class:`RobustDebiasTrainer`.

A subclass, because neither way that Trainer offers for a loss knows the groups: ``compute_loss_func`` never sees the
inputs, and the forwards of masked language models ignore what they are given beyond their own arguments.

docs/trainer.md shows its use. Letters: B sequences, T tokens, M labelled positions, V vocabulary, G groups.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import rd_kernels as rd
from robustdebias.checkpoint import read_json, write_json
from robustdebias.collate import IGNORED, MLMCollator
from robustdebias.config import TrainConfig
from robustdebias.group_meter import GroupMeter
from robustdebias.in_forward import SameDraws, in_forward
from robustdebias.losses import GroupLoss, Rows, build_loss
from robustdebias.modeling import HeadInputs, has_adapter, masked_lm_inputs
from robustdebias.trainer_settings import check_groups, check_settings

__all__ = ["GROUP_WEIGHTS", "RobustDebiasTrainer"]

GROUP_WEIGHTS = "group_weights.json"
"""The file with q, by the groups' names, that lies beside a saved model trained with Group DRO."""


class RobustDebiasTrainer(Trainer):
    """Trains a masked language model with one of :mod:`robustdebias.losses`.

    ``loss_fn`` is the loss; with Group DRO, ``loss_fn.group_weights`` is q, float32 [G].

    Args:
        model: a masked language model.
        args: with ``remove_unused_columns=False``.
        data_collator: gives batches as :class:`MLMCollator` does: input_ids, attention_mask, labels [B, T] int64 (-100:
            no label), groups bool [B, G] or [B, T, G]; positions may be missing. MLMCollator itself gets the epoch, so
            that every epoch of the training has masks of its own; evaluation always has those of epoch 0.
        group_names: the columns of ``groups``.
        group_counts: number of training examples in each group [G]; needed by "reweight" and by ``adjustment``.
        config: the objective and its parameters, ``accumulation`` and ``backend``; by default Group DRO. What of it has a
            counterpart in ``args`` or needs other data must have its default. ``step_size`` None is 5 / steps.
        options: those of Trainer, but for model_init and compute_loss_func.

    Raises: ValueError for arguments outside of what is said here, and for settings under which the loss would not be
    what it says (see docs/trainer.md); what :func:`build_loss` raises. When called with batches, ValueError for one
    without labels or groups, or with another number of groups; on resuming, for a checkpoint without q or of other groups.
    """

    # The losses of a step's micro-batches add up to the step's: Trainer must not divide them by their number.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        data_collator: Callable[[list[Any]], dict[str, Tensor]],
        group_names: Sequence[str],
        group_counts: Sequence[int] | None = None,
        config: TrainConfig | None = None,
        **options: Any,
    ):
        config = config or TrainConfig()
        check_settings(args, config, options)
        self.group_names = list(group_names)
        counts = check_groups(self.group_names, group_counts, config, data_collator)
        linear = has_adapter(model)
        build_loss(config, self.group_names, counts, linear=linear)  # raises before anything is written
        super().__init__(model, args, data_collator, **options)

        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise ValueError(f"args: {kind.value} is not supported; data-parallel processes are")
        process_group = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        loss_fn = build_loss(config, self.group_names, counts, linear=linear, process_group=process_group)
        self.model_accepts_loss_kwargs = True  # where Trainer does not know ``loss_is_scaled_for_ga``
        self.config = config
        self.loss_fn = loss_fn.to(args.device)
        # Of the whole evaluation there are sums and counts by group, whatever the objective; its loss plays no part.
        op_class = rd.LinearGroupDROLoss if linear else rd.GroupDROLoss
        self._eval_op = op_class(
            len(self.group_names), objective=rd.ERM(), group_names=self.group_names, process_group=process_group,
            backend=config.backend,
        ).to(args.device).eval()  # fmt: skip
        self._losses: Iterator[Tensor] | None = None  # those to come of the step's micro-batches
        self._unfinished = 0  # number of those
        self._step_calls: list[Any] = []  # what the loss can report of each of them
        self._train_meter, self._eval_meter = GroupMeter(), GroupMeter()
        self._train_collator = data_collator
        if isinstance(data_collator, MLMCollator):
            self._train_collator = _MasksOfEpoch(data_collator)
            self.add_callback(self._train_collator)

    # The loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """Trainer hands out all micro-batches of a step here, before it trains on the first."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._checked(self._prepare_inputs(batch)) for batch in batches]
        if self._losses is not None:  # a step that was left before its end
            self._losses.close()  # type: ignore[attr-defined]
        self._losses, self._unfinished, self._step_calls = self._step_losses(batches), len(batches), []
        return batches, items

    def _step_losses(self, batches: Sequence[dict[str, Tensor]]) -> Iterator[Tensor]:
        draws = SameDraws(self.args.device)

        def apply(k: int, function: Callable[[HeadInputs], Any]) -> Any:
            with draws.of(k):  # the dropout masks, where a batch runs twice
                return self._run(self.model_wrapped, batches[k], function)

        if self.config.accumulation == "exact" and len(batches) > 1:
            yield from self.loss_fn.window([Rows.of(batch) for batch in batches], apply)
        else:
            for k in range(len(batches)):
                yield apply(k, partial(self.loss_fn, share=1 / len(batches)))

    def _run(self, model: Any, batch: dict[str, Tensor], function: Callable[[HeadInputs], Any]) -> Any:
        """``function`` of the head's inputs."""
        inner = self.accelerator.unwrap_model(model)

        def run(batch: dict[str, Tensor]) -> Any:
            with self.accelerator.autocast():  # which accelerate puts into the model's own forward only
                return function(masked_lm_inputs(inner, batch))

        return in_forward(model, inner, run, batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch: in training its part in the step's, else the mean over its labelled tokens.

        With ``return_outputs`` the full logits [B, T, V] too, which takes a second forward.
        """
        if not model.training:
            self._run(model, self._checked(inputs), self._observe)
            loss = torch.tensor(self._eval_op.report().overall.loss, device=self.args.device)
        elif self._losses is not None:
            loss = next(self._losses)
        else:  # not called by the training loop
            loss = self._run(model, self._checked(inputs), self.loss_fn)
        if not return_outputs:
            return loss
        encoder_inputs = {
            key: inputs[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in inputs
        }
        return loss, {"logits": model(**encoder_inputs).logits}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # A shallow copy can report of this call when others have followed; until then its numbers stay on the device.
        call = copy.copy(self.loss_fn.op if isinstance(self.loss_fn, GroupLoss) else self.loss_fn)
        self._step_calls.append(call)
        self._train_meter.add(call)
        self._unfinished -= 1
        if self._losses is not None and self._unfinished == 0:
            next(self._losses, None)  # closes the window
            self._losses = None
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Here the number of steps is known for the first time, and with it the default step size."""
        if isinstance(self.loss_fn, GroupLoss) and self.config.step_size is None:
            op = self.loss_fn.op
            op.objective = replace(op.objective, step_size=5 / num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _checked(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """With ``positions``."""
        for name in ("labels", "groups"):
            if batch.get(name) is None:
                raise ValueError(f"batch: no {name!r}, only {', '.join(batch)}; MLMCollator makes them")
        if batch["groups"].shape[-1] != len(self.group_names):
            shape = list(batch["groups"].shape)
            raise ValueError(f"batch: groups {shape}, but there are {len(self.group_names)} group_names")
        if "positions" in batch:
            return dict(batch)
        return {**batch, "positions": (batch["labels"].flatten() != IGNORED).nonzero()[:, 0]}

    # Data

    def get_train_dataloader(self) -> Any:
        evaluating, self.data_collator = self.data_collator, self._train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluating

    # Evaluation

    def _observe(self, inputs: HeadInputs) -> None:
        if inputs.weight is None:
            self._eval_op(inputs.hidden, inputs.labels, inputs.groups)
        else:
            self._eval_op(inputs.hidden, inputs.weight, inputs.labels, inputs.groups, inputs.bias)
        self._eval_meter.add(copy.copy(self._eval_op))

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        inputs = self._without_repeated(self._prepare_inputs(inputs))
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None

    def _without_repeated(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The last batches of several processes are filled up with examples that were there before: here without labels."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        labels = inputs["labels"].clone()
        labels[max(state.remainder - self.accelerator.process_index * len(labels), 0) :] = IGNORED
        return {**{name: value for name, value in inputs.items() if name != "positions"}, "labels": labels}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As Trainer's. The loss is the mean over all labelled tokens, whatever the objective; with it come the
        mean of each group that has any, and the largest of these. q stays as it is."""
        self._eval_meter = GroupMeter()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        overall, by_group = self._eval_meter.read()
        metrics = {f"loss_{name}": loss for name, loss in by_group.items()}
        if overall is not None:
            metrics["loss"] = overall
        if by_group:
            metrics["worst_group_loss"] = max(by_group.values())
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs of the training get the groups': mean losses since the last log, weights of the last step."""
        if "loss" in logs and self._step_calls:
            _, by_group = self._train_meter.read()
            weights = self.loss_fn.weights_of([call.report() for call in self._step_calls])
            logs.update({f"group_loss/{name}": loss for name, loss in by_group.items()})
            logs.update({f"group_weight/{name}": weight for name, weight in weights.items()})
            if by_group:
                logs["worst_group_loss"] = max(by_group.values())
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save and isinstance(self.loss_fn, GroupLoss):
            directory = Path(output_dir or str(self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            # Numbers of JSON are doubles here, which hold a float32 exactly.
            q = dict(zip(self.group_names, self.loss_fn.group_weights.tolist(), strict=True))
            write_json(directory / GROUP_WEIGHTS, q)
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_group_weights(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._load_group_weights(self.state.best_model_checkpoint)
        super()._load_best_model()

    def _load_group_weights(self, checkpoint: str | None) -> None:
        if not isinstance(self.loss_fn, GroupLoss):
            return
        path = Path(checkpoint or "") / GROUP_WEIGHTS
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: {path} is missing; the checkpoint is not of Group DRO")
        saved = read_json(path)
        if list(saved) != self.group_names:
            raise ValueError(
                f"resume_from_checkpoint: {path} has groups {list(saved)}, not {self.group_names}"
            )
        self.loss_fn.group_weights.copy_(torch.tensor(list(saved.values())))


class _MasksOfEpoch(TrainerCallback):
    """A Trainer calls its collator with the batch alone, which would give every epoch the same masks."""

    def __init__(self, collator: MLMCollator):
        self.collator, self.epoch = collator, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int(state.epoch)

    def __call__(self, batch: Sequence[Any]) -> dict[str, Tensor]:
        return self.collator(batch, self.epoch)
