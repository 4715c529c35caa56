"""A downstream task: what is learnt and what is left alone, hand-computed scores, draws against scikit-learn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from robustdebias.evaluation import downstream, glue
from robustdebias.evaluation.metric import Metric

FIXTURE = Path(__file__).parent / "fixtures" / "glue"
LEARNING: dict[str, Any] = {"epochs": 10, "batch_size": 16, "lr": 3e-3}
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 66, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2,
    "sep_token_id": 3,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": {**SMALL, "type_vocab_size": 1},
    "albert": {**SMALL, "embedding_size": 16},
    "electra": {**SMALL, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 66},
    "modernbert": SMALL,
}


class Weights:
    """Draws that a test can look into: how often each item was drawn."""

    def __init__(self, draws: int = 9, few: int = 1):
        self.draws, self.few = draws, few
        self.times = np.zeros((draws, 0), dtype=int)

    def enough(self, items: int) -> bool:
        return items >= self.few

    def apply(self, outcomes: np.ndarray) -> np.ndarray:
        items = len(outcomes)
        self.times = np.random.default_rng(5).multinomial(items, np.full(items, 1 / items), size=self.draws)
        return self.times @ outcomes


def evaluate(model: torch.nn.Module, tokenizer: Any, path: Path = FIXTURE, **options: Any) -> dict[str, Any]:
    return downstream.evaluate(
        model, tokenizer, path, **{"max_length": 64, "epochs": 1, **options}, progress=False
    )


def write_task(folder: Path, train: str, dev: str) -> Path:
    (folder / "train.tsv").write_text(train, encoding="utf-8")
    (folder / "dev.tsv").write_text(dev, encoding="utf-8")
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pairs of sentences and how alike they are."""
    rows = [
        "He likes bread.\tHe likes bread.\t5.0",
        "He likes bread.\tShe sells a lamp at home.\t0.25",
        "The man reads.\tThe man finds a book.\t2",
        "The city.\tThe river near the city.\t3.5",
        "She keeps her garden.\tShe keeps her house.\t3.75",
    ]
    header = "sentence1\tsentence2\tscore\n"
    return write_task(tmp_path, header + "\n".join(rows), header + "\n".join(rows[1:]) + "\n")


def test_a_tiny_bert_learns_the_task(tiny_tokenizer: Any, tiny_model: torch.nn.Module) -> None:
    result = evaluate(tiny_model, tiny_tokenizer, **LEARNING)
    assert result["majority"] == 50
    assert result["scores"]["accuracy"] > 75
    assert result["scores"]["mcc"] > 50
    assert result["counts"] == {"train": 64, "dev": 30}
    assert result["classes"] == ["negative", "positive"]
    assert downstream.scores(result).keys() == {
        "accuracy", "f1", "mcc", "gap", "group.men", "group.muslims", "group.women",
    }  # fmt: skip
    json.dumps(result, allow_nan=False)


def test_the_same_seed_gives_the_same(tiny_tokenizer: Any, tiny_model: torch.nn.Module, pairs: Path) -> None:
    one, same, other = (
        evaluate(tiny_model, tiny_tokenizer, pairs, task="regression", batch_size=2, seed=seed)
        for seed in (3, 3, 4)
    )
    assert one.pop("seconds") > 0
    del same["seconds"]
    assert one == same
    assert one["per_item"]["predicted"] != other["per_item"]["predicted"]
    assert one["items"] != other["items"], "two recipes were taken for comparable"


def test_the_model_is_left_alone(tiny_tokenizer: Any, tiny_model: torch.nn.Module) -> None:
    tiny_model.train()
    tiny_model.cls.eval()
    tiny_model(torch.tensor([[2, 40, 3]])).logits.sum().backward()
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    gradients = {
        name: None if p.grad is None else p.grad.clone() for name, p in tiny_model.named_parameters()
    }
    modes = [module.training for module in tiny_model.modules()]
    state, config = torch.get_rng_state(), tiny_model.config.to_dict()
    evaluate(tiny_model, tiny_tokenizer, **LEARNING)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
    for name, parameter in tiny_model.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, gradients[name])
    assert [module.training for module in tiny_model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_model.config.to_dict() == config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_from_its_encoder(
    family: str, tiny_tokenizer: Any, pairs: Path, tmp_path: Path
) -> None:
    """The copy's encoder has the weights that transformers itself loads from the saved model."""
    config = AutoConfig.for_model(family, vocab_size=len(tiny_tokenizer), **FAMILIES[family])
    model = AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=3)
    own = downstream._classifier(model, 3)
    assert type(own) is type(loaded)
    expected, copied = loaded.base_model.state_dict(), own.base_model.state_dict()
    assert expected.keys() == copied.keys()
    compared = [name for name in expected if not name.startswith("pooler.")]
    assert len(compared) > 5
    assert all(torch.equal(expected[name], copied[name]) for name in compared)
    assert own.num_labels == 3
    assert sum(evaluate(model, tiny_tokenizer)["counts"].values()) == 94
    assert evaluate(model, tiny_tokenizer, pairs, task="regression")["scores"].keys() == {
        "pearson", "spearman",
    }  # fmt: skip


def test_two_steps_by_hand(tiny_tokenizer: Any, make_tiny_model: Callable[..., Any], pairs: Path) -> None:
    """All rows in one batch, no dropout: a step of AdamW at the full rate, one at the half, gradients clipped."""
    model = make_tiny_model(
        len(tiny_tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).eval()
    result = evaluate(
        model, tiny_tokenizer, pairs, task="regression", lr=0.01, epochs=2, batch_size=8, seed=5
    )
    torch.manual_seed(5)
    by_hand = downstream._classifier(model, 1)
    lines = [line.split("\t") for line in (pairs / "train.tsv").read_text().splitlines()[1:]]
    first, second, score = (list(column) for column in zip(*lines, strict=True))
    inputs = tiny_tokenizer(first, second, padding=True, return_tensors="pt", return_token_type_ids=True)
    assert inputs["token_type_ids"].any()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01, weight_decay=0.0)
    wanted = torch.tensor([float(number) for number in score])
    for rate in (0.01, 0.005):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        ((by_hand(**inputs).logits[:, 0] - wanted) ** 2).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        assert norm > 1, "the clipping is not seen"
        optimizer.step()
    with torch.inference_mode():
        expected = by_hand(**inputs).logits[1:, 0].tolist()
    assert result["per_item"]["predicted"] == pytest.approx(expected, abs=1e-4)
    assert result["per_item"]["true"] == [0.25, 2, 3.5, 3.75]
    pearson, spearman = (
        measure([0.25, 2, 3.5, 3.75], expected)[0]
        for measure in (scipy.stats.pearsonr, scipy.stats.spearmanr)
    )
    assert result["scores"] == pytest.approx({"pearson": 100 * pearson, "spearman": 100 * spearman}, abs=1e-2)
    assert (result["majority"], result["classes"], result["by_group"]) == (None, [], {})


def test_hand_computed_scores() -> None:
    true, predicted = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    # Two true positives, a false one of each kind, a true negative.
    assert downstream._scores(true, predicted, 2) == pytest.approx(
        {"accuracy": 60, "f1": 200 / 3, "mcc": 100 * (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)}
    )
    true, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    # F1: 2/3, 2/4, 0. Gorodkin: (2 * 4 - (2 * 1 + 1 * 3)) / sqrt((16 - 6) (16 - 10)).
    assert downstream._scores(true, predicted, 3) == pytest.approx(
        {"accuracy": 50, "f1": 100 * (2 / 3 + 1 / 2) / 3, "mcc": 300 / math.sqrt(60)}
    )
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-1.75, 0.25, -0.75, 2.25): 5.5 / sqrt(5 * 8.75); ranks 1 3 2 4.
    numbers = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 5.0])
    assert downstream._scores(*numbers, 0) == pytest.approx(
        {"pearson": 550 / math.sqrt(5 * 8.75), "spearman": 80}
    )
    assert downstream._scores(numbers[0], np.ones(4), 0) == {"pearson": None, "spearman": None}


ROWS = "label\tgroups\tsentence\n"
"""In dev.tsv below, four women's rows, of which one is a muslim's too, two men's, two nobody's."""


@pytest.fixture
def answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any, tiny_model: Any
) -> dict[str, Any]:
    train = "label\tsentence\n" + "yes\ta\n" * 3 + "no\tb\n" * 2 + "maybe\tc\n"
    dev = [
        "yes\twomen\ta", "no\twomen\ta", "no\t women , muslims\ta", "yes\twomen\ta", "yes\tmen\ta", "maybe\tmen,men\ta",
        "no\t\ta", "yes\t\ta",
    ]  # fmt: skip
    task = write_task(tmp_path, train, ROWS + "\n".join(dev))
    # In order: maybe 0, no 1, yes 2.
    monkeypatch.setattr(downstream, "_answers", lambda *_: np.array([2, 1, 2, 2, 1, 1, 1, 1]))
    return evaluate(tiny_model, tiny_tokenizer, task)


def test_hand_computed_groups(answered: dict[str, Any]) -> None:
    assert answered["classes"] == ["maybe", "no", "yes"]
    assert answered["scores"]["accuracy"] == 50
    assert answered["majority"] == 50  # "yes", four of eight
    assert answered["by_group"] == {
        "men": {"accuracy": 0, "count": 2},
        "muslims": {"accuracy": 0, "count": 1},
        "women": {"accuracy": 75, "count": 4},
    }
    assert answered["gap"] == 75
    assert downstream.scores(answered)["group.women"] == 75
    assert answered["per_item"]["groups"] == [[2], [2], [1, 2], [2], [0], [0], [], []]


def test_draws_are_the_scores_of_the_rows_drawn(answered: dict[str, Any]) -> None:
    weights = Weights(draws=40)
    drawn = downstream.draws(answered, weights)
    assert drawn.keys() == downstream.scores(answered).keys()
    true, predicted = (np.array(answered["per_item"][key]) for key in ("true", "predicted"))
    names = list(answered["by_group"])
    undefined = 0
    for draw, times in enumerate(weights.times):
        rows = np.repeat(np.arange(8), times)
        own = true[rows], predicted[rows]
        assert drawn["accuracy"][draw] == pytest.approx(100 * sklearn.metrics.accuracy_score(*own))
        assert drawn["f1"][draw] == pytest.approx(100 * sklearn.metrics.f1_score(*own, average="macro"))
        assert drawn["mcc"][draw] == pytest.approx(100 * sklearn.metrics.matthews_corrcoef(*own))
        accuracies = []
        for group, name in enumerate(names):
            hits = [
                true[row] == predicted[row] for row in rows if group in answered["per_item"]["groups"][row]
            ]
            if hits:
                accuracies.append(100 * np.mean(hits))
                assert drawn[f"group.{name}"][draw] == pytest.approx(accuracies[-1])
            else:
                undefined += 1
                assert np.isnan(drawn[f"group.{name}"][draw])
        assert drawn["gap"][draw] == pytest.approx(max(accuracies) - min(accuracies))
    assert undefined, "no draw left a group out"


def test_draws_of_two_classes(tiny_tokenizer: Any, tiny_model: torch.nn.Module) -> None:
    result = evaluate(tiny_model, tiny_tokenizer, **LEARNING)
    weights = Weights()
    drawn = downstream.draws(result, weights)
    true, predicted = (np.array(result["per_item"][key]) for key in ("true", "predicted"))
    for draw, times in enumerate(weights.times):
        own = np.repeat(true, times), np.repeat(predicted, times)
        assert drawn["f1"][draw] == pytest.approx(100 * sklearn.metrics.f1_score(*own))
        assert drawn["mcc"][draw] == pytest.approx(100 * sklearn.metrics.matthews_corrcoef(*own))


def test_degenerate_draws_of_two_classes() -> None:
    """As scikit-learn has it: no positives, then all rows of one class."""
    confusion = np.array([[[4, 0], [0, 0]], [[0, 0], [1, 3]], [[0, 0], [4, 0]]])
    drawn = downstream._of_confusion(confusion)
    assert drawn["f1"] == pytest.approx([0, 100 * 6 / 7, 0])
    assert drawn["mcc"] == pytest.approx([0, 0, 0])
    assert drawn["accuracy"] == pytest.approx([100, 75, 0])


def test_draws_of_a_regression() -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(size=20) + 1000
    predicted = true + generator.normal(size=20)
    result = {"per_item": {"true": true.tolist(), "predicted": predicted.tolist()}, "classes": []}
    weights = Weights()
    drawn = downstream.draws(result, weights)
    assert drawn.keys() == {"pearson"}
    for draw, times in enumerate(weights.times):
        expected = scipy.stats.pearsonr(np.repeat(true, times), np.repeat(predicted, times))[0]
        assert drawn["pearson"][draw] == pytest.approx(100 * expected)


def test_few_rows_get_no_draws(answered: dict[str, Any]) -> None:
    assert downstream.draws(answered, Weights(few=9)) == {}
    assert downstream.draws(answered, Weights(few=4)).keys() == {"accuracy", "f1", "mcc", "group.women"}
    del answered["per_item"]
    assert downstream.draws(answered, Weights()) == {}


def test_how_scores_are_read() -> None:
    names = ("accuracy", "f1", "mcc", "pearson", "spearman", "gap", "group.men")
    read = [downstream.metric(name) for name in names]
    assert all(isinstance(own, Metric) for own in read)
    assert [own.name for own in read] == list(names)
    assert [own.ideal for own in read] == ["100"] * 5 + ["0", "100"]
    assert read[-1].label == "downstream accuracy, men"


@pytest.mark.parametrize(
    ("header", "texts"),
    [
        ("index\tsentence\tlabel", ("s",)),
        ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", ("q1", "q2")),
        ("index\tquestion\tsentence\tlabel", ("q", "s")),
        ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ("one", "two")),
        ("index\tsentence1\tsentence2\tlabel1\tgold_label", ("one", "two")),
    ],
)
def test_columns_of_glues_tasks(header: str, texts: tuple[str, ...], tmp_path: Path) -> None:
    names = header.split("\t")
    values = {
        "sentence": "s", "question": "q", "question1": "q1", "question2": "q2", "sentence1": "one", "sentence2": "two",
        "#1 String": "one", "#2 String": "two",
    }  # fmt: skip
    labels = ("label", "is_duplicate", "Quality", "gold_label")
    rows = [
        "\t".join(value if name in labels else values.get(name, "7") for name in names) for value in "010"
    ]
    task = glue.read_task(
        write_task(tmp_path, "\n".join([header, *rows]), "\n".join([header, *rows])), "classification"
    )
    assert [row.texts for row in task.dev.rows] == [texts] * 3
    assert task.train.targets.tolist() == [0, 1, 0]


def test_quotes_are_literal(tmp_path: Path) -> None:
    text = 'He said "so\tno\n"She said"\tyes\r\n\n'
    task = glue.read_task(
        write_task(tmp_path, "\ufeffsentence\tlabel\r\n" + text, "sentence\tlabel\n" + text), "classification"
    )
    assert [row.texts for row in task.train.rows] == [('He said "so',), ('"She said"',)]
    assert task.classes == ["no", "yes"]


GOOD = "sentence\tlabel\na\tyes\nb\tno\n"


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        (GOOD, "gj04\t1\t\tOur friends won't buy it.\n", r"dev\.tsv:1: no column sentence.*CoLA"),
        (GOOD, "", r"dev\.tsv:1: no column sentence"),
        ("sentence\tmark\na\tb\n", GOOD, r"train\.tsv:1: no column label in \['sentence', 'mark'\]"),
        (GOOD, "sentence\tlabel\n", r"dev\.tsv: no rows in it"),
        (GOOD, "sentence\tlabel\na\tyes\nb\n", r"dev\.tsv:3: 1 columns, but line 1 names 2"),
        (GOOD, "sentence\tlabel\n\nb\tno\tx\n", r"dev\.tsv:3: 3 columns, but line 1 names 2"),
        (GOOD, "sentence\tlabel\n \tyes\n", r"dev\.tsv:2: column sentence is empty"),
        (GOOD, "sentence\tlabel\na\t\n", r"dev\.tsv:2: column label is empty"),
        (GOOD, "sentence\tlabel\na\tyes\na\tmaybe\n", r"dev\.tsv:3: label 'maybe' does not occur.*no, yes"),
        ("sentence\tlabel\na\tyes\n", GOOD, r"train\.tsv: every label is 'yes'"),
        ("sentence\tlabel\na\t3.8\nb\t1\n", GOOD, r"train\.tsv: labels such as 3\.8 are numbers"),
        (GOOD, "sentence1\tsentence2\tlabel\na\tb\tyes\n", r"dev\.tsv:1: texts in 2 columns, but in 1"),
    ],
)
def test_bad_files_are_named(train: str, dev: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        glue.read_task(write_task(tmp_path, train, dev), "classification")


@pytest.mark.parametrize("label", ["good", "nan", "inf"])
def test_a_regression_needs_numbers(label: str, tmp_path: Path) -> None:
    numbers = "sentence\tlabel\na\t1\nb\t2\n"
    with pytest.raises(ValueError, match=rf"dev\.tsv:3: label '{label}' is not a finite number"):
        glue.read_task(write_task(tmp_path, numbers, numbers.replace("b\t2", f"b\t{label}")), "regression")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(GOOD)
    with pytest.raises(ValueError, match=r"dev\.tsv: no such file; a task is a folder with train\.tsv"):
        glue.read_task(tmp_path, "classification")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"task": "ranking"}, "task: expected one of classification, regression, got 'ranking'"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"lr": math.nan}, "lr: expected a positive number, got nan"),
        ({"max_length": 128}, "max_length: 128 tokens, but the model has 64 positions"),
    ],
)
def test_bad_arguments_are_named(
    option: dict[str, Any], message: str, tiny_tokenizer: Any, tiny_model: torch.nn.Module
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model, tiny_tokenizer, **option)


def test_a_loss_that_is_not_finite_is_an_error(tiny_tokenizer: Any, tiny_model: torch.nn.Module) -> None:
    with torch.no_grad():
        tiny_model.bert.embeddings.word_embeddings.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match="downstream task: the loss is nan"):
        evaluate(tiny_model, tiny_tokenizer)
