"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

DATA, GROUPS, TRAINING, EVALUATION = "Data and model", "Groups", "Training", "Evaluation"


class Objective(str, Enum):
    erm = "erm"
    reweight = "reweight"
    group_dro = "group_dro"
    cvar = "cvar"
    chi_square = "chi_square"


class GroupLevel(str, Enum):
    sequence = "sequence"
    token = "token"


class Accumulation(str, Enum):
    exact = "exact"
    streaming = "streaming"


class AbsentGroups(str, Enum):
    hold = "hold"
    decay = "decay"


class Level(str, Enum):
    attribute = "attribute"
    value = "value"
    intersection = "intersection"


CorpusOption = Annotated[
    str,
    typer.Option("--corpus", metavar="PATH|ID", help="Text to learn from.", rich_help_panel=DATA),
]
ModelOption = Annotated[
    str,
    typer.Option("--model", metavar="ID|DIR", help="Hub id or local directory.", rich_help_panel=DATA),
]
HeadOption = Annotated[
    Path | None,
    typer.Option("--head", help="File with an MLM head, for an encoder that has none.", rich_help_panel=DATA),
]
TextFieldOption = Annotated[
    str, typer.Option("--text-field", help="Field or column with the text.", rich_help_panel=DATA)
]
SplitOption = Annotated[
    str, typer.Option("--split", help="Split of a Hugging Face data set.", rich_help_panel=DATA)
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Read only the first texts.", rich_help_panel=DATA)
]
HeldOutOption = Annotated[
    float,
    typer.Option("--held-out", min=0, max=0.9, help="Share of documents held out.", rich_help_panel=DATA),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="Of split, order, masks, dropout.", rich_help_panel=DATA)
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", help="cpu, cuda, ...; auto takes a GPU if there is one.", rich_help_panel=DATA),
]
MaxLengthOption = Annotated[
    int, typer.Option("--max-length", min=3, help="Tokens a passage may have.", rich_help_panel=DATA)
]
LabelFieldOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label-field",
        help="Field with ready-made labels; may be given several times.",
        rich_help_panel=GROUPS,
    ),
]
LabelAxisOption = Annotated[
    bool,
    typer.Option(
        "--label-axis",
        help="Call labels by their field or file too, gender:female; other levels do.",
        rich_help_panel=GROUPS,
    ),
]
LevelOption = Annotated[
    Level,
    typer.Option(
        "--level", help="gender, gender:female, or gender:female x religion:muslim.", rich_help_panel=GROUPS
    ),
]
ClustersOption = Annotated[
    int | None,
    typer.Option(
        "--clusters", min=2, help="So many groups of passages alike to the model.", rich_help_panel=GROUPS
    ),
]
RequireOption = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="GROUP",
        help="An error if it can't be trained on; repeatable.",
        rich_help_panel=GROUPS,
    ),
]
GroupsOption = Annotated[
    str | None,
    typer.Option(
        "--groups",
        metavar="NAME,...",
        show_default="gender,race,religion, or the corpus's own labels",
        help="Lexicons that come with the package; NAME:any makes one group of all its classes.",
        rich_help_panel=GROUPS,
    ),
]
LexiconOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--lexicon", help="A lexicon of your own; may be given several times.", rich_help_panel=GROUPS
    ),
]
MinTextsOption = Annotated[
    int,
    typer.Option(
        "--min-texts",
        min=1,
        help="Groups with fewer training passages are not told apart.",
        rich_help_panel=GROUPS,
    ),
]
StereoSetOption = Annotated[
    Path | None, typer.Option("--stereoset", help="StereoSet's dev set (JSON).", rich_help_panel=EVALUATION)
]
CrowsPairsOption = Annotated[
    Path | None,
    typer.Option("--crows-pairs", help="crows_pairs_anonymized.csv.", rich_help_panel=EVALUATION),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder with stereoset/dev.jsonl and crows_pairs/crows_pairs_anonymized.csv; either may be absent.",
        rich_help_panel=EVALUATION,
    ),
]
EvalTextsOption = Annotated[
    int,
    typer.Option(
        "--eval-texts", min=0, help="Held-out passages to measure on, at most.", rich_help_panel=EVALUATION
    ),
]
BackendOption = Annotated[
    str,
    typer.Option("--backend", help="Of rd_kernels; see python -m rd_kernels.info.", rich_help_panel=TRAINING),
]
