"""Every method from one start, several batches a step, and counterfactuals, in whole runs of a tiny model."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_runs import CONFIG, NO_DROPOUT, assert_same_run, run, weights

from robustdebias.config import OBJECTIVES, RAISED_DROPOUT
from robustdebias.corpus import OTHER, load_corpus
from robustdebias.finetuning import swapper_for
from robustdebias.groups import GroupAnnotator
from robustdebias.modeling import HeadInputs, load
from robustdebias.preparation import PreparedCorpus, prepare
from robustdebias.sampling import BatchStream
from robustdebias.training import _Labels, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def annotator() -> GroupAnnotator:
    return GroupAnnotator(["gender", "religion"])


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path, annotator: GroupAnnotator) -> PreparedCorpus:
    return prepare(load_corpus(tiny_corpus), annotator, held_out=0.2, min_texts=5)


METHODS = {
    "erm": {"objective": "erm"},
    "erm_cda": {"objective": "erm", "cda": True},
    "erm_cda_all": {"objective": "erm", "cda": True, "cda_keep": "all"},
    "erm_dropout": {"objective": "erm", **RAISED_DROPOUT},
    "reweight": {"objective": "reweight"},
    "group_dro": {"objective": "group_dro"},
    "group_dro_adjusted": {"objective": "group_dro", "adjustment": 3.0},
    "group_dro_cda": {"objective": "group_dro", "cda": True},
    "cvar": {"objective": "cvar", "alpha": 0.3},
    "chi_square": {"objective": "chi_square", "radius": 0.5},
}


def test_every_method_from_one_start(
    tiny_model_dir: Path, corpus: PreparedCorpus, annotator: GroupAnnotator, tmp_path: Path
) -> None:
    """Each finishes in as many steps, is recorded, ends elsewhere than all others, and in the same place again."""
    swapper = swapper_for(["gender", "religion"])
    config = replace(CONFIG, max_steps=None, epochs=1, save_every=0)
    steps = -(-len(corpus.train) // config.batch_size)
    ends: dict[str, dict[str, torch.Tensor]] = {}
    for name, options in METHODS.items():
        each = replace(config, **options)
        for out in (tmp_path / name, tmp_path / f"{name}-again"):
            result = run(each, tiny_model_dir, corpus, out, annotator=annotator, swapper=swapper)
        assert_same_run(tmp_path / name, tmp_path / f"{name}-again")
        assert len(result["history"]) == steps
        recorded = json.loads((tmp_path / name / "config.json").read_text())
        assert recorded["train"] == asdict(replace(each, max_steps=steps, step_size=config.step_size))
        assert (recorded["data"]["counterfactuals"] is not None) == each.cda
        ends[name] = weights(tmp_path / name)
        saved = json.loads((tmp_path / name / "model" / "config.json").read_text())
        assert saved["hidden_dropout_prob"] == saved["attention_probs_dropout_prob"] == 0.1
    for one, other in itertools.combinations(ends, 2):
        assert any(not torch.equal(ends[one][key], ends[other][key]) for key in ends[one]), (one, other)


def test_counterfactuals_are_of_the_training_texts_and_of_their_own_groups(
    tiny_model_dir: Path, corpus: PreparedCorpus, annotator: GroupAnnotator, tmp_path: Path
) -> None:
    swapper = swapper_for(["gender", "religion"])
    config = replace(CONFIG, cda=True, max_steps=2)
    data = run(config, tiny_model_dir, corpus, tmp_path / "pairs", annotator=annotator, swapper=swapper)[
        "config"
    ]["data"]
    mentioning = [example for example in corpus.train if example.groups != (OTHER,)]
    assert data["counterfactuals"]["texts"] == len(corpus.train)
    assert data["counterfactuals"]["augmented"] == len(mentioning)
    assert data["texts"] == 2 * len(mentioning)
    groups = data["groups"]
    assert OTHER not in groups  # nothing to swap there
    assert groups["gender:female"] == groups["gender:male"]  # each text of one has a pair in the other
    everything = run(
        replace(config, cda_keep="all"), tiny_model_dir, corpus, tmp_path / "all", annotator=annotator, swapper=swapper
    )["config"]["data"]  # fmt: skip
    others = len(corpus.train) - len(mentioning)
    assert everything["texts"] == data["texts"] + others
    assert everything["groups"][OTHER] == others

    # Ready-made labels: nobody to find a counterfactual's groups, so it has its original's.
    labelled = run(config, tiny_model_dir, corpus, tmp_path / "labels", swapper=swapper)["config"]["data"][
        "groups"
    ]
    assert labelled == {
        name: 2 * sum(name in (example.groups or ()) for example in mentioning) for name in groups
    }

    # So has a text whose label is not of the words in it.
    first = next(k for k, example in enumerate(corpus.train) if example.groups == ("gender:female",))
    wrong = list(corpus.train)
    wrong[first] = replace(wrong[first], groups=("gender:male",))
    with pytest.warns(
        UserWarning, match=f"cda: the groups of 1 of {len(wrong)} texts are not those of the words"
    ):
        mislabelled = run(
            config, tiny_model_dir, replace(corpus, train=wrong), tmp_path / "wrong", annotator=annotator,
            swapper=swapper,
        )["config"]["data"]["groups"]  # fmt: skip
    assert mislabelled["gender:male"] == groups["gender:male"] + 1
    assert mislabelled["gender:female"] == groups["gender:female"] - 1

    # A group whose texts all drop out is named.
    where = next(example for example in corpus.train if example.groups == (OTHER,)).text
    placed = [replace(each, groups=("place",)) if each.text == where else each for each in corpus.train]
    with pytest.warns(UserWarning, match="cda: none of their texts has a counterfactual: place$"):
        run(
            config, tiny_model_dir, replace(corpus, train=placed, group_names=[*corpus.group_names, "place"]),
            tmp_path / "placed", swapper=swapper,
        )  # fmt: skip

    # A group that is too small to stand alone does not come back as that of a counterfactual.
    names = [name for name in corpus.group_names if name != "gender:male"]
    folded = [
        replace(example, groups=tuple(name for name in example.groups or () if name in names) or (OTHER,))
        for example in corpus.train
    ]
    small = run(
        config, tiny_model_dir, replace(corpus, train=folded, group_names=names), tmp_path / "folded",
        annotator=annotator, swapper=swapper,
    )["config"]["data"]  # fmt: skip
    assert "gender:male" not in small["groups"]
    assert small["groups"]["gender:female"] == small["groups"][OTHER] == groups["gender:male"]


def test_labels_of_counterfactuals_know_folded_groups_and_intersections(annotator: GroupAnnotator) -> None:
    names = ["gender:female", "gender:female x religion:muslim", "gender:male", "religion:hindu", OTHER]
    labels = _Labels(annotator, names)
    assert labels.annotate("The Muslim woman reads.") == ("gender:female x religion:muslim",)
    assert labels.annotate("The woman reads.") == ("gender:female",)
    assert labels.annotate("The Hindu woman reads.") == ("gender:female", "religion:hindu")
    assert labels.annotate("The Muslim man reads.") == ("gender:male",)
    assert labels.annotate("A Muslim reads.") == labels.annotate("Somebody reads.") == (OTHER,)


def test_counterfactuals_at_token_level(
    tiny_model_dir: Path, corpus: PreparedCorpus, annotator: GroupAnnotator, tmp_path: Path
) -> None:
    config = replace(CONFIG, cda=True, group_level="token", max_steps=3)
    result = run(
        config,
        tiny_model_dir,
        corpus,
        tmp_path / "run",
        annotator=annotator,
        swapper=swapper_for(["gender", "religion"]),
    )
    assert result["config"]["data"]["groups"][OTHER] == result["config"]["data"]["texts"]
    assert OTHER in result["history"][0]["group_loss"]


@pytest.mark.parametrize("objective", ["cvar", "chi_square"])
def test_robustness_over_texts_needs_no_lexicon(
    objective: str, tiny_model_dir: Path, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    """The same run, whatever the groups: here one group of everybody, and those of the lexicons."""
    config = replace(CONFIG, objective=objective, max_steps=4)
    # The order of the examples follows the groups; a single one for both leaves texts the only thing that counts.
    labelled = [replace(example, groups=("all", *(example.groups or ()))) for example in corpus.train]
    alone = [replace(example, groups=("all",)) for example in corpus.train]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchStream, "_order", lambda self, epoch: torch.arange(len(self._stratum)))
        run(config, tiny_model_dir, replace(corpus, train=alone, group_names=["all"]), tmp_path / "alone")
        run(
            config, tiny_model_dir, replace(corpus, train=labelled, group_names=["all", *corpus.group_names]),
            tmp_path / "labelled",
        )  # fmt: skip
    for name, value in weights(tmp_path / "alone").items():
        torch.testing.assert_close(value, weights(tmp_path / "labelled")[name], rtol=1e-4, atol=1e-6)


def test_dropout_moves_the_run_and_is_not_saved(
    tiny_model_dir: Path, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    """A raised dropout trains the very model that was given."""
    model, tokenizer = load(tiny_model_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(
        replace(CONFIG, **RAISED_DROPOUT, max_steps=3), model, tokenizer, corpus.train, corpus.group_names,
        tmp_path / "run",
    )  # fmt: skip
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    saved, _ = load(tmp_path / "run" / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name
    assert saved.config.hidden_dropout_prob == model.config.hidden_dropout_prob == 0.1


# Several batches a step


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_streaming_accumulation_averages_its_batches(
    objective: str, tiny_model_dir: Path, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    """A step over two batches records what the two steps over one batch each did."""
    config = replace(
        CONFIG, **NO_DROPOUT, lr=1e-12, weight_decay=0.0, objective=objective, max_steps=4, batch_size=8
    )
    single = run(config, tiny_model_dir, corpus, tmp_path / "single")["history"]
    double = run(
        replace(config, accumulate=2, accumulation="streaming", max_steps=2), tiny_model_dir, corpus,
        tmp_path / "double",
    )["history"]  # fmt: skip
    for step, record in enumerate(double):
        parts = single[2 * step : 2 * step + 2]
        for name, count in record["group_count"].items():
            assert count == sum(part["group_count"].get(name, 0) for part in parts)
        assert record["objective"] == pytest.approx(sum(part["objective"] for part in parts) / 2, rel=1e-6)
        weights = [list(part["group_weight"].values()) for part in parts]
        last = (
            weights[-1]
            if objective == "group_dro"
            else [sum(pair) / 2 for pair in zip(*weights, strict=True)]
        )
        assert list(record["group_weight"].values()) == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_exact_accumulation_is_one_large_batch(
    objective: str,
    level: str,
    tiny_model_dir: Path,
    corpus: PreparedCorpus,
    annotator: GroupAnnotator,
    tmp_path: Path,
) -> None:
    """Without dropout, four batches of 8 record what one of 32 does, and move the weights as it does. (The masks of a
    text depend on the epoch, so both runs stay within the first.) In float64, of which q is what is not."""
    config = replace(
        CONFIG,
        **NO_DROPOUT,
        objective=objective,
        group_level=level,
        max_steps=4,
        batch_size=32,
        step_size=0.5,
    )
    small = replace(config, batch_size=8, accumulate=4)
    assert len(corpus.train) >= 4 * 32
    close = 1e-6 if objective == "group_dro" else 1e-9
    histories, saved = [], []
    for name, each in (
        ("large", config),
        ("small", small),
        ("streaming", replace(small, accumulation="streaming")),
    ):
        model, tokenizer = load(tiny_model_dir)
        result = train(
            each,
            model.double(),
            tokenizer,
            corpus.train,
            corpus.group_names,
            tmp_path / name,
            annotator=annotator,
        )
        histories.append(result["history"])
        saved.append(weights(tmp_path / name))
    for large, exact, streaming in zip(*histories, strict=True):
        for key in ("loss", "objective", "grad_norm", "group_loss", "group_weight"):
            assert exact[key] == pytest.approx(large[key], rel=close, abs=close), key
        assert exact["group_count"] == large["group_count"] == streaming["group_count"]
        assert streaming["objective"] != pytest.approx(large["objective"], rel=1e-5)
    for name, value in saved[0].items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(saved[1][name], value, rtol=0, atol=100 * close)
    assert any((saved[2][name] - value).abs().max() > 1e-4 for name, value in saved[0].items())


def test_both_forwards_of_an_exact_step_draw_the_same_dropout(
    tiny_model_dir: Path, corpus: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So q is updated from the losses that the gradients are of."""
    from robustdebias import training

    original, seen = training.masked_lm_inputs, []

    def watch(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> HeadInputs:
        inputs = original(model, batch)
        seen.append(inputs.hidden.detach().clone())
        return inputs

    monkeypatch.setattr(training, "masked_lm_inputs", watch)
    config = replace(CONFIG, batch_size=8, accumulate=3, max_steps=2, dropout=0.5, attention_dropout=0.5)
    run(config, tiny_model_dir, corpus, tmp_path / "run")
    assert len(seen) == 2 * (3 + 3)
    for step in (seen[:6], seen[6:]):
        for first, second in zip(step[:3], step[3:], strict=True):
            assert torch.equal(first, second)
