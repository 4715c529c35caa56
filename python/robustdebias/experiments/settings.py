"""What an experiment is: a TOML file, checked whole before anything runs."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robustdebias.config import TrainConfig
from robustdebias.grouping import Grouping

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DEMO_MODEL",
    "Corpus",
    "ExperimentSettings",
    "GroupingSettings",
    "Method",
    "TextSet",
    "load_settings",
]

DEMO_MODEL = "demo"
"""The model of ``robustdebias demo``, from the package index, in place of a directory or a hub id."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Section):
    """Where the model comes from.

    name: a hub id, a directory, or "demo".
    head: a file with an MLM head, for an encoder that has none.
    note: a sentence for the card.
    """

    name: str
    head: str | None = None
    note: str | None = None


class Corpus(_Section):
    """Text, as ``robustdebias finetune --corpus`` reads it. A path is looked up in the data folder.

    format: "wikitext" turns WikiText's tokens into natural text.
    """

    source: str | tuple[str, ...]
    format: Literal["auto", "wikitext"] = "auto"
    name: str | None = None
    licence: str | None = None
    text_field: str = "text"
    label_field: str | None = None
    document_field: str | None = None
    label_axis: bool = False
    split: str = "train"
    limit: Annotated[int, Field(ge=1)] | None = None


class GroupingSettings(_Section):
    """Where groups come from; see :class:`robustdebias.grouping.Grouping`."""

    source: Literal["lexicons", "labels", "clusters", "none"] = "lexicons"
    lexicons: tuple[str, ...] = ("gender", "race", "religion")
    level: Literal["attribute", "value", "intersection"] = "value"
    min_texts: Annotated[int, Field(ge=1)] = 20
    count: Annotated[int, Field(ge=2)] = 8
    seed: Annotated[int, Field(ge=0)] = 0

    def grouping(self) -> Grouping:
        return Grouping(**self.model_dump())


class Data(_Section):
    """Text to learn from, and what is held out of it: whole documents, the same for every seed."""

    corpora: Annotated[tuple[Corpus, ...], Field(min_length=1)]
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    split_seed: Annotated[int, Field(ge=0)] = 0


class TextSet(_Section):
    """Further text to measure the loss by group on, of another corpus."""

    corpus: Corpus
    grouping: GroupingSettings
    texts: Annotated[int, Field(ge=1)] = 1000


class Neutral(_Section):
    """Sentences about nobody in particular, for pseudo-perplexity: it costs a forward pass a token.

    A sentence with a word that the corpus' makers took away ("<unk>") is left out.
    """

    corpus: Corpus
    texts: Annotated[int, Field(ge=1)] = 100


class Evaluation(_Section):
    """What the start and every run are measured on. Paths are looked up in the data folder."""

    texts: Annotated[int, Field(ge=1)] = 2000
    sets: dict[str, TextSet] = {}
    stereoset: str | None = None
    stereoset_tasks: tuple[Literal["intrasentence", "intersentence"], ...] = ("intrasentence",)
    crows_pairs: str | None = None
    crows_pairs_forms: tuple[Literal["original", "differing"], ...] = ("original",)
    seat: str | None = None
    neutral: Neutral | None = None
    downstream: str | None = None


class Method(_Section):
    """What is run under a name: the training options in which it differs from [train]."""

    label: str | None = None
    description: str | None = None
    train: dict[str, Any]


class ExperimentSettings(_Section):
    """A whole experiment. The first method is the baseline that the others are compared with."""

    title: str
    description: str = ""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    model: Model
    data: Data
    groupings: Annotated[dict[str, GroupingSettings], Field(min_length=1)]
    train: dict[str, Any] = {}
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    evaluation: Evaluation = Evaluation()
    keep_models: bool = True

    @model_validator(mode="before")
    @classmethod
    def _methods_are_flat(cls, values: Any) -> Any:
        """[methods.NAME] lists its training options beside label and description."""
        methods = values.get("methods") if isinstance(values, dict) else None
        if not isinstance(methods, dict):
            return values
        own = set(Method.model_fields) - {"train"}
        nested = {
            name: {key: value for key, value in method.items() if key in own}
            | {"train": {key: value for key, value in method.items() if key not in own}}
            if isinstance(method, dict)
            else method
            for name, method in methods.items()
        }
        return {**values, "methods": nested}

    def train_config(self, method: str, seed: int) -> TrainConfig:
        """The configuration of one run."""
        return TrainConfig.from_dict(
            {**self.train, **self.methods[method].train, "seed": seed}, f"methods.{method}"
        )


def load_settings(path: str | Path) -> ExperimentSettings:
    """Read and check an experiment's file.

    Raises ValueError naming file and key: not readable as TOML (with the line), a key that does not exist (with the
    nearest one that does), a value of the wrong kind, a training option out of bounds; FileNotFoundError.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not readable as TOML: {error}") from None
    try:
        settings = ExperimentSettings.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: " + "; ".join(_problem(each, values) for each in error.errors())) from None
    for where, given in (
        ("train", settings.train),
        *((f"methods.{n}", m.train) for n, m in settings.methods.items()),
    ):
        if "seed" in given:
            raise ValueError(f"{path}: {where}: seed: an experiment's seeds stand in its list of seeds")
        try:
            TrainConfig.from_dict({**settings.train, **given}, f"{path}: {where}")
        except TypeError as error:
            raise ValueError(str(error)) from None
    if repeated := {seed for seed in settings.seeds if settings.seeds.count(seed) > 1}:
        raise ValueError(f"{path}: seeds: {sorted(repeated)} stand there twice")
    for kind in ("methods", "groupings"):
        for name in getattr(settings, kind):
            if not name.replace("-", "").replace("_", "").isalnum() or name == "start":
                raise ValueError(
                    f"{path}: {kind}.{name}: a name of letters, digits, '-' and '_' that is not 'start' is needed: "
                    "it becomes a folder"
                )
    return settings


def _problem(error: Any, values: Any) -> str:
    """One of pydantic's errors as a sentence that names the key as the file has it."""
    keys = [str(part) for part in error["loc"]]
    where = ".".join(keys)
    if error["type"] == "extra_forbidden":
        return f"{where}: no such key{_nearest(keys[-1], _allowed(keys[:-1]))}"
    if error["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _allowed(keys: list[str]) -> list[str]:
    """The keys of the section at ``keys``."""
    found: Any = ExperimentSettings
    for key in keys:
        field = getattr(found, "model_fields", {}).get(key)
        if field is not None:
            found = next((each for each in _sections(field.annotation)), None)
    return list(getattr(found, "model_fields", {}))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a type speaks of: of ``dict[str, TextSet]`` it is TextSet."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [each for part in getattr(annotation, "__args__", ()) for each in _sections(part)]


def _nearest(key: str, allowed: Any) -> str:
    close = difflib.get_close_matches(key, list(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(allowed))}"
