"""SEAT: hand-computed vectors, exact and random permutations held against scipy, draws against the plain formula."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from robustdebias.evaluation import seat
from robustdebias.evaluation.metric import Metric

FIXTURE = Path(__file__).parent / "fixtures" / "seat"


def evaluate(model: torch.nn.Module, tokenizer: Any, path: Path = FIXTURE, **options: Any) -> dict[str, Any]:
    return seat.evaluate(model, tokenizer, path, progress=False, **options)


def random_sets(*sizes: int, width: int = 5, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(size, width)) for size in sizes]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return sum(one * other) / math.sqrt(sum(one**2)) / math.sqrt(sum(other**2))


def plain_associations(words: np.ndarray, a: np.ndarray, b: np.ndarray) -> list[float]:
    """As the paper writes it, one cosine at a time."""
    return [
        math.fsum(cosine(w, v) for v in a) / len(a) - math.fsum(cosine(w, v) for v in b) / len(b)
        for w in words
    ]


class Weights:
    """Draws that a test can look into: how often each item was drawn, of every call."""

    def __init__(self, draws: int = 7, few: int = 1):
        self.generator = np.random.default_rng(5)
        self.draws, self.few = draws, few
        self.drawn: list[np.ndarray] = []

    def enough(self, items: int) -> bool:
        return items >= self.few

    def apply(self, outcomes: np.ndarray) -> np.ndarray:
        items = len(outcomes)
        self.drawn.append(self.generator.multinomial(items, np.full(items, 1 / items), size=self.draws))
        return self.drawn[-1] @ outcomes


def test_hand_computed_effect_size() -> None:
    """In the plane, A along one axis and B along the other: s(w) = cos - sin of the angle of w."""
    a, b = np.array([[2.0, 0.0]]), np.array([[0.0, 5.0], [0.0, 1.0]])
    x = np.array([[1.0, 0.0], [3.0, 4.0]])  # s = 1 and 3/5 - 4/5 = -1/5
    y = np.array([[0.0, 2.0], [8.0, 6.0]])  # s = -1 and 4/5 - 3/5 = 1/5
    assert seat.associations(np.concatenate([x, y]), a, b) == pytest.approx([1, -0.2, -1, 0.2])
    # Means 0.4 and -0.4; squares about the mean 0 add up to 2.08, over n - 1 = 3.
    assert seat.effect_size(x, y, a, b) == pytest.approx(0.8 / math.sqrt(2.08 / 3))
    # Pairs out of 1, -1/5, -1, 1/5 whose sum is at least 4/5: {1, -1/5} and {1, 1/5}, of six.
    assert seat.permutation_p(x, y, a, b) == 2 / 6


def test_associations_and_effect_size_are_the_papers() -> None:
    x, y, a, b = random_sets(6, 6, 3, 4)
    s_x, s_y = plain_associations(x, a, b), plain_associations(y, a, b)
    assert seat.associations(x, a, b) == pytest.approx(s_x, abs=1e-14)
    expected = (np.mean(s_x) - np.mean(s_y)) / np.std(s_x + s_y, ddof=1)
    assert seat.effect_size(x, y, a, b) == pytest.approx(expected, abs=1e-13)


def test_invariances() -> None:
    x, y, a, b = random_sets(5, 7, 3, 4)
    d = seat.effect_size(x, y, a, b)
    assert seat.effect_size(y, x, a, b) == pytest.approx(-d, abs=1e-13)
    assert seat.effect_size(x, y, b, a) == pytest.approx(-d, abs=1e-13)
    # Lengths play no part, nor does a rotation (here of axes).
    lengths = np.random.default_rng(1).uniform(0.1, 10, size=(5, 1))
    assert seat.effect_size(lengths * x, 7 * y, 0.3 * a, b) == pytest.approx(d, abs=1e-13)
    assert seat.effect_size(*(vectors[:, ::-1] for vectors in (x, y, a, b))) == pytest.approx(d, abs=1e-13)


def test_equal_associations_have_no_effect_size() -> None:
    x, y, a, b = random_sets(1, 1, 3, 4)
    assert math.isnan(seat.effect_size(np.tile(x, (5, 1)), 3 * np.tile(x, (4, 1)), a, b))
    assert not math.isnan(seat.effect_size(x, y, a, b))
    assert seat.permutation_p(np.tile(x, (5, 1)), 3 * np.tile(x, (4, 1)), a, b) == 1


@pytest.mark.parametrize(("size_x", "size_y"), [(4, 4), (6, 6), (3, 5), (2, 9)])
def test_exact_p_is_that_of_all_partitions(size_x: int, size_y: int) -> None:
    x, y, a, b = random_sets(size_x, size_y, 3, 4, seed=size_x)
    x = x + 0.5 * a.mean(0)
    s = np.array(plain_associations(np.concatenate([x, y]), a, b))
    differences = []
    for chosen in itertools.combinations(range(len(s)), size_x):
        inside = np.isin(np.arange(len(s)), chosen)
        differences.append(s[inside].mean() - s[~inside].mean())
    expected = np.mean(np.array(differences) >= differences[0] - 1e-12)
    p = seat.permutation_p(x, y, a, b)
    assert p == expected
    independent = scipy.stats.permutation_test(
        (s[:size_x], s[size_x:]), lambda u, v: np.mean(u) - np.mean(v), permutation_type="independent",
        alternative="greater", n_resamples=np.inf,
    )  # fmt: skip
    assert p == pytest.approx(independent.pvalue, abs=1e-12)


def test_ties_count() -> None:
    """Of associations 1, 1, -1 against 1, -1, -1 half of all first sets are as good or better."""
    a, b = np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]])
    signs = np.array([1, 1, -1, 1, -1, -1])
    vectors = np.stack([signs, np.zeros(6)], 1)
    # Three out of six, at least two of the three positive: C(3,2) C(3,1) + 1 = 10 of 20.
    assert seat.permutation_p(vectors[:3], vectors[3:], a, b) == 0.5
    # The same in numbers whose sums are rounded: cosines of 1/3 and 0.1.
    a, b = np.array([[1.0, 1 / 3]]), np.array([[0.1, 1.0]])
    assert seat.permutation_p(vectors[:3], vectors[3:], a, b) == 0.5


def test_random_partitions_agree_with_all_of_them() -> None:
    """6 + 6 targets have 924 partitions: one fewer allowed, and 923 are drawn. Within four standard errors."""
    x, y, a, b = random_sets(6, 6, 3, 4, seed=2)
    x = x + 0.2 * a.mean(0)
    exact = seat.permutation_p(x, y, a, b, partitions=924)
    assert 0.02 < exact < 0.9
    sampled = [seat.permutation_p(x, y, a, b, partitions=923, seed=seed) for seed in range(4)]
    assert len(set(sampled)) > 1
    assert sampled[1] == seat.permutation_p(x, y, a, b, partitions=923, seed=1)
    for p in sampled:
        # Multiples of 1/924 here and there: 923 + 1 is also the denominator of what is drawn.
        assert p * 924 == pytest.approx(round(p * 924), abs=1e-9)
        assert abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / 923) + 1 / 924


def test_random_p_is_never_zero() -> None:
    """X lies with A and Y with B: no partition of thousands comes near, and p = 1 / (n + 1)."""
    x, a = np.array([[1.0, 0.1]]), np.array([[1.0, 0.0]])
    towards = np.array([[0.1, 1.0]])
    p = seat.permutation_p(np.tile(x, (40, 1)), np.tile(towards, (40, 1)), a, a[:, ::-1], partitions=5_000)
    assert p == 1 / 5_001


def test_many_random_partitions_agree_with_scipy() -> None:
    """60 + 60 targets, 100,000 partitions in several blocks; within four standard errors of scipy's 20,000."""
    x, y, a, b = random_sets(60, 60, 3, 4, seed=3)
    x = x + 0.2 * (a.mean(0) - b.mean(0))
    s = seat.associations(np.concatenate([x, y]), a, b)
    independent = scipy.stats.permutation_test(
        (s[:60], s[60:]), lambda u, v, axis: u.mean(axis) - v.mean(axis), vectorized=True, n_resamples=20_000,
        alternative="greater", rng=np.random.default_rng(0), batch=2_000,
    ).pvalue  # fmt: skip
    p = seat.permutation_p(x, y, a, b)
    assert 0.001 < p < 0.5
    assert abs(p - independent) < 4 * math.sqrt(p * (1 - p) / 20_000)
    assert p * 100_001 == pytest.approx(round(p * 100_001), abs=1e-6)


def test_a_tiny_bert_end_to_end(tiny_tokenizer: Any, tiny_model: torch.nn.Module) -> None:
    """Every number again from embeddings of one sentence at a time, as Meade et al.'s code takes them."""
    result = evaluate(tiny_model, tiny_tokenizer, batch_size=7)

    def embed(sentence: str) -> np.ndarray:
        ids = torch.tensor([tiny_tokenizer.encode(sentence)])
        with torch.inference_mode():
            hidden = tiny_model.bert(ids).last_hidden_state[0]
        return hidden.double().mean(0).numpy()

    tiny_model.eval()
    for name in ("places", "religion1", "weat6b"):
        data = json.loads((FIXTURE / f"sent-{name}.jsonl").read_text())
        sets = [
            np.stack([embed(s) for s in data[key]["examples"]])
            for key in ("targ1", "targ2", "attr1", "attr2")
        ]
        own = result["tests"][name]
        assert own["counts"] == [len(chosen) for chosen in sets]
        assert own["effect_size"] == pytest.approx(seat.effect_size(*sets), abs=1e-5)
        assert own["p"] == pytest.approx(seat.permutation_p(*sets), abs=1e-3)
        associations = result["associations"][name]
        assert associations["x"] == pytest.approx(plain_associations(sets[0], *sets[2:]), abs=1e-6)
        assert associations["y"] == pytest.approx(plain_associations(sets[1], *sets[2:]), abs=1e-6)
    assert [result["tests"][name]["group"] for name in ("places", "religion1", "weat6b")] == [
        None, "religion", "gender",
    ]  # fmt: skip
    gender, religion = (abs(result["tests"][name]["effect_size"]) for name in ("weat6b", "religion1"))
    assert result["by_group"] == {"gender": gender, "race": None, "religion": religion}
    assert result["overall"] == pytest.approx((gender + religion) / 2)
    scores = seat.scores(result)
    assert scores.keys() == {
        "overall", "gender", "race", "religion", "test.weat6b", "test.religion1", "test.places",
    }  # fmt: skip
    assert scores["test.places"] == result["tests"]["places"]["effect_size"]
    json.dumps(result, allow_nan=False)


def test_the_first_token_as_embedding(tiny_tokenizer: Any, tiny_model: torch.nn.Module) -> None:
    result = evaluate(tiny_model, tiny_tokenizer, pooling="cls")
    data = json.loads((FIXTURE / "sent-weat6b.jsonl").read_text())
    tiny_model.eval()
    sets = []
    for key in ("targ1", "targ2", "attr1", "attr2"):
        batch = [torch.tensor([tiny_tokenizer.encode(sentence)]) for sentence in data[key]["examples"]]
        with torch.inference_mode():
            sets.append(
                np.stack([tiny_model.bert(ids).last_hidden_state[0, 0].double().numpy() for ids in batch])
            )
    assert result["tests"]["weat6b"]["effect_size"] == pytest.approx(seat.effect_size(*sets), abs=1e-5)
    mean = evaluate(tiny_model, tiny_tokenizer)
    assert result["tests"]["weat6b"]["effect_size"] != pytest.approx(
        mean["tests"]["weat6b"]["effect_size"], abs=1e-3
    )
    assert result["items"] != mean["items"], "two poolings were taken for comparable"


def test_the_model_keeps_its_mode_and_weights(tiny_tokenizer: Any, tiny_model: torch.nn.Module) -> None:
    tiny_model.train()
    tiny_model.cls.eval()
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    modes = [module.training for module in tiny_model.modules()]
    first, second = (evaluate(tiny_model, tiny_tokenizer) for _ in range(2))
    assert first == second, "dropout was on"
    assert [module.training for module in tiny_model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())


class Counting(torch.nn.Module):
    """Embeds a sentence by its token ids; says which sentences it was given."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(value))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        for row, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            self.seen.append(tuple(row[: sum(mask)]))
        wave = torch.sin(input_ids[..., None] * torch.arange(1.0, 7.0))
        # What stands at padding must not matter, not even if it is no number.
        return SimpleNamespace(
            last_hidden_state=torch.where(attention_mask[..., None] > 0, self.weight * wave, torch.nan)
        )


def test_every_sentence_is_embedded_once(tiny_tokenizer: Any) -> None:
    model = Counting()
    evaluate(model, tiny_tokenizer)
    assert len(model.seen) == len(set(model.seen))
    sentences = {
        sentence
        for file in FIXTURE.iterdir()
        for chosen in json.loads(file.read_text()).values()
        for sentence in chosen["examples"]
    }
    assert set(model.seen) == {tuple(tiny_tokenizer.encode(sentence)) for sentence in sentences}


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_an_embedding_without_direction_is_an_error(value: float, tiny_tokenizer: Any) -> None:
    with pytest.raises(RuntimeError, match=r"SEAT: the embedding of '.*' is zero or not finite"):
        evaluate(Counting(value), tiny_tokenizer)


def test_draws_are_the_scores_of_the_sentences_drawn(
    tiny_tokenizer: Any, tiny_model: torch.nn.Module
) -> None:
    result = evaluate(tiny_model, tiny_tokenizer)
    weights = Weights()
    draws = seat.draws(result, weights)
    assert draws.keys() == {name for name, value in seat.scores(result).items() if value is not None}
    drawn = iter(weights.drawn)
    for name, own in result["associations"].items():
        times_x, times_y = next(drawn), next(drawn)
        for draw in range(weights.draws):
            x, y = np.repeat(own["x"], times_x[draw]), np.repeat(own["y"], times_y[draw])
            d = (x.mean() - y.mean()) / np.concatenate([x, y]).std(ddof=1)
            assert draws[f"test.{name}"][draw] == pytest.approx(d, rel=1e-9)
    assert draws["gender"] == pytest.approx(np.abs(draws["test.weat6b"]))
    assert draws["overall"] == pytest.approx(
        (np.abs(draws["test.weat6b"]) + np.abs(draws["test.religion1"])) / 2
    )


def test_few_sentences_get_no_draws(tiny_tokenizer: Any, tiny_model: torch.nn.Module) -> None:
    """weat6b has 12 + 12 targets, the others have 4 + 4."""
    result = evaluate(tiny_model, tiny_tokenizer)
    assert seat.draws(result, Weights(few=12)).keys() == {"gender", "test.weat6b"}
    assert seat.draws(result, Weights(few=13)) == {}
    del result["associations"]
    assert seat.draws(result, Weights()) == {}


def test_how_scores_are_read() -> None:
    read = {name: seat.metric(name) for name in ("overall", "gender", "test.weat6b")}
    assert all(isinstance(own, Metric) and own.ideal == "0" for own in read.values())
    assert [own.label for own in read.values()] == [
        "SEAT mean |d|", "SEAT mean |d|, gender", "SEAT d, weat6b",
    ]  # fmt: skip
    assert [own.name for own in read.values()] == list(read)


def test_a_test_without_differences_is_left_out(
    tmp_path: Path, tiny_tokenizer: Any, tiny_model: torch.nn.Module
) -> None:
    same = write_test(tmp_path / "sent-weat6.jsonl", targ1=["He reads."], targ2=["He reads."])
    result = evaluate(tiny_model, tiny_tokenizer, same.parent)
    assert result["tests"]["weat6"]["effect_size"] is None
    assert result["overall"] is None
    assert seat.scores(result)["gender"] is None
    assert seat.draws(result, Weights()) == {}
    json.dumps(result, allow_nan=False)


def write_test(path: Path, **changes: Any) -> Path:
    sets = {"targ1": ["He."], "targ2": ["She."], "attr1": ["A book."], "attr2": ["A lamp."], **changes}
    path.write_text(json.dumps({key: {"examples": value} for key, value in sets.items()}, indent=1))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attr1": []}, r"sent-own\.jsonl: attr1\.examples must be a list of sentences"),
        ({"targ2": "She."}, r"sent-own\.jsonl: targ2\.examples must be a list of sentences"),
        ({"targ1": ["He.", 3]}, r"sent-own\.jsonl: targ1\.examples must hold texts, got 3"),
        ({"targ1": ["He.", " "]}, r"sent-own\.jsonl: targ1\.examples must hold texts, got ' '"),
    ],
)
def test_bad_sets_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_test(tmp_path / "sent-own.jsonl", **change)
    with pytest.raises(ValueError, match=message):
        seat.read_tests(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "targ1": }', r"sent-own\.jsonl:2: not one JSON object"),
        (b'{"targ1": {"examples": ["A."]}}\n{}', r"sent-own\.jsonl:2: not one JSON object"),
        (b"[]", r"sent-own\.jsonl: targ1\.examples must be a list of sentences"),
        (b'{"targ1": {"examples": ["\xff"]}}', r"sent-own\.jsonl: not UTF-8"),
    ],
)
def test_bad_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "sent-own.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        seat.read_tests(tmp_path)


def test_bad_arguments_are_named(tmp_path: Path, tiny_tokenizer: Any, tiny_model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="pooling: expected one of mean, cls, got 'max'"):
        evaluate(tiny_model, tiny_tokenizer, pooling="max")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(tiny_model, tiny_tokenizer, batch_size=0)
    with pytest.raises(ValueError, match=r"no folder with SEAT's files sent-\*\.jsonl"):
        evaluate(tiny_model, tiny_tokenizer, tmp_path)
    write_test(tmp_path / "sent-own.jsonl", targ1=["book " * 80])
    with pytest.raises(ValueError, match="82 tokens, but the model reads at most 64"):
        evaluate(tiny_model, tiny_tokenizer, tmp_path)


def test_the_published_tests(
    data_dir: Path, tiny_tokenizer: Any, make_tiny_model: Callable[..., Any]
) -> None:
    model = make_tiny_model(len(tiny_tokenizer))
    result = evaluate(model, tiny_tokenizer, data_dir / "seat")
    files = {file.stem.removeprefix("sent-") for file in (data_dir / "seat").glob("sent-*")}
    assert result["tests"].keys() == files
    grouped = [name for name, test in result["tests"].items() if test["group"]]
    assert len(grouped) == 17, "the tests of Meade et al."
    assert all(np.isfinite(value) for value in seat.scores(result).values())
    assert all(0 < test["p"] <= 1 for test in result["tests"].values())
    assert all(test["counts"][0] == test["counts"][1] for test in result["tests"].values())
    weights = Weights(few=10)
    assert seat.draws(result, weights).keys() == seat.scores(result).keys()
