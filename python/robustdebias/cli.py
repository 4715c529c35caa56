"""The command line: the program itself; each command has a file in ``commands/``.

Torch and Transformers are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from robustdebias.commands import compare, demo, evaluate, experiment, finetune, groups

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

BAD_INPUT, FAILURE = 2, 1


def _clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Say in one line what went wrong: exit code 2 for bad input, 1 for a failure, 128 + n for signal n.

    ROBUSTDEBIAS_TRACEBACK=1 shows where it happened.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _say("stopped")
            raise typer.Exit(130) from None
        except Exception as error:
            if isinstance(error, typer.Exit) or os.environ.get("ROBUSTDEBIAS_TRACEBACK"):
                raise
            signum = getattr(error, "signum", None)  # interrupts.Interrupted
            if signum is not None:
                _say(f"\n{error}")
                raise typer.Exit(128 + signum) from None
            bad_input = isinstance(error, (ValueError, TypeError, OSError, ModuleNotFoundError))
            label = "error" if bad_input else f"failed ({type(error).__name__})"
            _say(f"{label}: {' '.join(str(error).split())}")
            raise typer.Exit(BAD_INPUT if bad_input else FAILURE) from None

    return run


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("rd-kernels")
        except PackageNotFoundError:  # run from a source tree
            from rd_kernels import __version__ as number
        print(f"robustdebias {number}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune a masked language model across demographic groups, and measure what that does to its bias.

    Group DRO gives weight to the groups with the larger loss, so that
    fine-tuning does not buy one group's quality with another's. Compare it with
    plain fine-tuning (erm) on your own text:

    \b
    robustdebias demo                     # the whole tour, minutes on 2 cores
    robustdebias groups my.txt            # which groups it has
    robustdebias finetune --corpus my.txt --out runs/dro
    robustdebias finetune --corpus my.txt --out runs/erm --objective erm
    robustdebias compare runs/erm runs/dro --out report
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns whenever a process is started
    warnings.showwarning = lambda message, *_args, **_kwargs: _say(f"warning: {message}")


for command in (
    demo.demo, groups.groups, finetune.finetune, evaluate.evaluate, compare.compare, experiment.experiment,
):  # fmt: skip
    app.command()(_clean_errors(command))
