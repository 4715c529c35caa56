"""Counterparts, the swapper, two-sided augmentation."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustdebias.augmentation import Swapper, augment
from robustdebias.corpus import Example, load_corpus, split_documents
from robustdebias.counterparts import builtin_counterparts, load_counterparts
from robustdebias.groups import GroupAnnotator, load_lexicon
from robustdebias.possessives import stands_before_noun

POSSESSIVES = Path(__file__).parent / "fixtures" / "possessives.tsv"
GENDER = Swapper(["gender"])
BOLD = ("gender", "race", "religious_ideology")
ALL = Swapper(["gender", "race", "religion"])


@pytest.fixture
def make(tmp_path):
    """make(counterparts, lexicon=...) -> the loaded counterparts of a lexicon "mine" with classes a, b, c."""

    def write(content: str, lexicon: str = "[a]\nsun\nsun ray\n[b]\nmoon\n[c]\nstar\n"):
        folder = tmp_path / "lexicon"
        folder.mkdir(exist_ok=True)
        (folder / "mine.txt").write_text(lexicon, encoding="utf-8")
        (tmp_path / "mine.txt").write_text(content, encoding="utf-8")
        return load_counterparts(tmp_path / "mine.txt", folder / "mine.txt")

    return write


def possessives() -> list[tuple[str, str, int]]:
    """What the marked word of each sentence becomes, the sentence, and where the word ends."""
    found = []
    for line in POSSESSIVES.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            expected, sentence = line.split("\t")
            end = sentence.index("]") - 1
            found.append((expected, sentence.replace("[", "").replace("]", ""), end))
    return found


# Gender: both ways


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("She met her uncle.", "He met his aunt."),
        ("He gave his book to her, and hers to his mother-in-law.", "She gave her book to him, and his to her father-in-law."),
        ("The women's team thanked Ms. Lee's husband himself.", "The men's team thanked Mr. Lee's wife herself."),
        ("An heir and a niece, a duchess and an uncle", "An heir and a nephew, a duke and an aunt"),
        ("Brothers-in-law, sons and stepsisters", "Sisters-in-law, daughters and stepbrothers"),
        ("Her first song made him a star.", "His first song made her a star."),
        ("A worker may bring his or her own tools.", "A worker may bring her or his own tools."),
        ("“Ladies and gentlemen,” she said, “be quiet.”", "“Gentlemen and ladies,” he said, “be quiet.”"),
    ],
)  # fmt: skip
def test_gender(one, other):
    assert GENDER(one).text == other
    forth = GENDER(other).text
    assert forth.replace("Mrs.", "Ms.") == one  # "Ms." is read, "Mrs." is written


def test_words_without_a_way_back():
    assert GENDER("An actress and a ballerina danced.").text == "An actor and a ballet dancer danced."
    assert GENDER("The First Lady thanked Lady Grey.").text == "The First Gentleman thanked Lord Grey."
    assert GENDER("First Lady Ann Grey and Queen Ann").text == "First gentleman Ann Grey and King Ann"


def test_an_article_fits_the_counterpart():
    assert (
        GENDER("An actress, a heroine, AN hour with an uncle.").text
        == "An actor, a hero, AN hour with an aunt."
    )
    assert GENDER("A waitress, an heiress").text == "A waiter, an heir"
    race = variants("He met an Asian student.", "race")
    assert {"She met a black student.", "She met an Indigenous student."} < race
    assert not any("an black" in text or "a Indigenous" in text for text in race)


def test_names_and_false_friends_stay():
    for text in (
        "Stephen King lives on the Isle of Man.",
        "John ate black bread in Christian Street.",
        "",
        "Rain.",
    ):
        counterfactual = ALL(text)
        assert not counterfactual
        assert counterfactual.text == text


def test_capitals():
    assert GENDER("Her. HER").text == "Him. HER"  # what is written all in capitals is no mention
    uncased = Swapper(["gender", "religion"], cased=False)
    assert uncased("SHE saw HIS Aunt.").text == "HE saw HER Uncle."
    shown = {Swapper(["religion"], cased=False, seed=seed)("a muslim family").text for seed in range(40)}
    assert shown == {f"a {word} family" for word in ("christian", "jewish", "hindu", "sikh", "buddhist")}


@pytest.mark.parametrize(
    ("expected", "accuracy"), [("his", 0.93), ("him", 0.84), ("her", 1.0), ("hers", 0.76)]
)
def test_her_and_his_on_the_labelled_sentences(expected, accuracy):
    """As measured, rounded down; the sentences are chosen to be harder than text is."""
    outcome = [
        {"her": ("him", "his"), "his": ("hers", "her")}[sentence[end - 3 : end].lower()][stands_before_noun(sentence, end)]
        for wanted, sentence, end in possessives()
        if wanted == expected
    ]  # fmt: skip
    assert len(possessives()) == 89
    assert outcome.count(expected) / len(outcome) >= accuracy


def test_her_where_text_says_which_it_was(data_dir):
    """ "his" and "him" tell apart what "her" does not: write "her" in their place, and the rule has to find them."""
    texts = [
        example.text for file in BOLD for example in load_corpus(data_dir / "bold" / f"{file}_wiki.json")
    ]
    outcome = Counter()
    for text in texts:
        for word in re.finditer(r"\b(his|him)\b", text):
            rewritten = text[: word.start()] + "her" + text[word.end() :]
            guess = "his" if stands_before_noun(rewritten, word.start() + 3) else "him"
            outcome[word[0] == guess] += 1
    assert outcome[True] + outcome[False] > 1500
    assert outcome[True] / (outcome[True] + outcome[False]) > 0.98


def test_the_rule_takes_a_long_enumeration():
    assert not stands_before_noun("her" + " and her" * 5000 + ".", 3)


# More than two classes


def variants(text: str, lexicon: str) -> set[str]:
    return {Swapper(["gender", lexicon], seed=seed)(text).text for seed in range(60)}


def test_each_other_class_is_chosen_and_one_for_the_whole_text():
    assert variants("Muslims built a mosque; every mosque has an imam.", "religion") == {
        "Christians built a church; every church has a priest.",
        "Jews built a synagogue; every synagogue has a rabbi.",
        "Hindus built a Hindu temple; every Hindu temple has a Hindu priest.",
        "Sikhs built a gurdwara; every gurdwara has a granthi.",
        "Buddhists built a Buddhist temple; every Buddhist temple has a Buddhist priest.",
    }


def test_two_groups_stay_two():
    for text in variants("Muslims and Jews met Muslims and Christians.", "religion"):
        first, second, third, fourth = re.findall(r"[A-Z]\w+", text)
        assert first == third
        assert len({first, second, fourth}) == 3
        assert (first, second, fourth) != ("Muslims", "Jews", "Christians")


def test_the_choice_depends_on_text_and_seed_alone():
    texts = [f"Sikhs opened house {number}." for number in range(40)]
    once = [ALL(text).text for text in texts]
    assert once == [Swapper(["gender", "race", "religion"])(text).text for text in texts]
    assert once != [Swapper(["religion"], seed=1)(text).text for text in texts]
    counts = Counter(text.split()[0] for text in once)
    assert set(counts) == {"Christians", "Muslims", "Jews", "Hindus", "Buddhists"}


def test_lexicons_that_overlap_are_both_swapped():
    assert variants("Muslim women and black men’s mosque", "religion") == {
        f"{faith} men and black women’s {place}"
        for faith, place in [("Christian", "church"), ("Jewish", "synagogue"), ("Hindu", "Hindu temple"),
                             ("Sikh", "gurdwara"), ("Buddhist", "Buddhist temple")]
    }  # fmt: skip
    assert variants("The black women sang.", "race") == {
        f"The {word} men sang." for word in ("white", "Asian", "Latino", "Middle Eastern", "Indigenous")
    }


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The Methodist Church and Pope Francis", 2),
        ("Black Lives Matter", 1),
        ("South Asians and British Asians", 2),
        ("The Church of England", 1),
        ("Kurds and Sherpas", 2),
    ],
)
def test_a_mention_without_a_counterpart_stays_whole(text, left):
    counterfactual = ALL(text)
    assert (counterfactual.text, counterfactual.left, counterfactual.swaps) == (text, left, {})


def test_the_rotation_swaps_as_many_mentions_as_it_can(make):
    """Of b and c only c has a word for "sun ray"."""
    swapper = Swapper([make("[a / b / c]\nsun / moon / star\nsun ray / - / starlight\n")])
    assert {swapper(f"{number} sun ray, sun").text for number in range(9)} == {
        f"{number} starlight, star" for number in range(9)
    }


def test_the_earlier_lexicon_has_its_way(tmp_path):
    pairs = []
    for name, word in (("one", "sun"), ("two", "the sun")):
        (tmp_path / f"{name}.txt").write_text(f"[a / b]\n{word} / {name}\n")
        lexicon = tmp_path / "lexicons" / f"{name}.txt"
        lexicon.parent.mkdir(exist_ok=True)
        lexicon.write_text(f"[a]\n{word}\n[b]\nmoon\n")
        pairs.append(load_counterparts(tmp_path / f"{name}.txt", lexicon))
    assert Swapper(pairs)("see the sun").text == "see the one"
    counterfactual = Swapper(pairs[::-1])("see the sun")
    assert (counterfactual.text, counterfactual.swaps, counterfactual.left) == ("see two", {"two": 1}, 1)


# Properties

NEUTRAL = [
    "table",
    "walked",
    "of",
    "the",
    "rivers",
    "7",
    "and",
    "–",
    "quickly",
    "\n",
    "(",
    ")",
    "“",
    "Zürich",
    "e.g.",
    ",",
]
# Words that both classes write as they are read, with what makes the possessives clear. ("Gentleman" opening a sentence
# becomes "Lady", and that "Lord".)
TWO_WAY = [
    "she", "he", "her lamp", "his lamp", "him.", "hers.", "herself", "woman", "men", "girl", "mother", "dads", "niece",
    "granddaughter", "nephew", "wives", "husband", "king", "princess", "duke", "empress", "landlady", "spokeswoman",
    "chairmen", "policewoman", "widow", "widower", "an uncle", "aunts", "sisterhood", "mother-in-law", "masculine",
]  # fmt: skip


@given(st.lists(st.sampled_from(NEUTRAL + TWO_WAY), max_size=12), st.booleans())
def test_swapping_twice_gives_the_original(parts, capital):
    text = " ".join(parts)
    if capital:
        text = text[:1].upper() + text[1:]
    assert GENDER(GENDER(text).text).text == text


@given(
    st.lists(
        st.sampled_from([*NEUTRAL, *TWO_WAY, "Muslim women", "an Asian man", "a mosque", "Jews"]), max_size=12
    )
)
def test_nothing_else_changes(parts):
    text = " ".join(parts)
    counterfactual = ALL(text)
    strip = re.compile(r"table|walked|rivers|7|–|quickly|Zürich|e\.g\.|[(),“]")
    assert strip.findall(counterfactual.text) == strip.findall(text)
    assert bool(counterfactual) == bool(counterfactual.swaps) == (counterfactual.text != text)
    if not ALL.annotator.spans(text):
        assert not counterfactual


@given(st.text(max_size=60))
def test_any_text_is_taken(text):
    assert GENDER(text).text == text or GENDER(text).swaps


def test_every_gender_term_but_few_has_a_counterpart_of_the_other_class():
    lexicon = load_lexicon("gender")
    terms = [(" ".join(term), value) for term, value in lexicon.terms.items() if value]
    swapped = {term for term, _ in terms if GENDER(f"x {term} lamp")}
    assert len(swapped) / len(terms) > 0.98
    for term, value in terms:
        if term in swapped - {"Mrses", "Mses"}:  # plurals that are no words
            assert f"gender:{value}" not in GENDER.annotator.annotate(GENDER(f"x {term} lamp").text)


# Files


def test_builtin_counterparts():
    assert {"gender", "race", "religion"} <= set(builtin_counterparts())
    for name in builtin_counterparts():
        counterparts = load_counterparts(name)
        assert set(counterparts.classes) <= set(counterparts.lexicon.classes)


def test_plurals_alternatives_and_hyphens(make):
    swapper = Swapper(
        [
            make(
                "# none\n\n[a / b]\nsun|day star / moon\nsun ray / moon beam\n",
                "[a]\nsun|ray\nsun ray\n[b]\nmoon|moons\n",
            )
        ]
    )
    assert swapper("Suns, sun; sun-rays and a moon beam").text == "Moons, moon; moon-beams and a sun ray"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sun / moon\n", r"mine\.txt:1: expected the classes first, such as \[female / male\], got 'sun / moon'"),
        ("[a]\n", r"mine\.txt:1: expected the classes first"),
        ("", r"mine\.txt: expected the classes first"),
        ("[a / d]\nsun / x\n", r"mine\.txt:1: class 'd': .* of lexicon 'mine': a, b, c"),
        ("[a / a]\nsun / x\n", r"mine\.txt:1: class 'a': expected each at most once"),
        ("[a / b]\n\nsun / moon / star\n", r"mine\.txt:3: expected 2 columns \(a / b\), got 'sun / moon / star'"),
        ("[a / b]\nsun\n", r"mine\.txt:2: expected 2 columns"),
        ("[a / b]\nsun / \n", r"mine\.txt:2: no word in ''"),
        ("[a / b]\nsun| / moon\n", r"mine\.txt:2: no word in 'sun\|', or an empty alternative"),
        ("[a / b]\n- / -\n", r"mine\.txt:2: no word in '- / -'"),
        ("[a / b]\nsun / moon\n# x\nsun / night\n", r"mine\.txt:4: 'sun' of class 'a' is ambiguous: listed before, at .*mine\.txt:2"),
        ("[a / b]\n", r"mine\.txt: no line with counterparts"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_file_and_line(make, content, message):
    with pytest.raises(ValueError, match=message):
        make(content)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "gender.txt").write_bytes(b"[female / male]\nfianc\xe9e / fianc\xe9\n")
    with pytest.raises(ValueError, match=r"gender\.txt:2: not UTF-8"):
        load_counterparts(tmp_path / "gender.txt")


def test_unknown_and_repeated_names():
    with pytest.raises(ValueError, match=r"'height': neither a file nor .* gender, race, religion"):
        Swapper(["height"])
    with pytest.raises(ValueError, match="distinct names"):
        Swapper(["gender", "gender"])
    with pytest.raises(ValueError, match="at least one"):
        Swapper([])


# Augmentation


def test_two_sided_in_order_with_documents():
    examples = [
        Example("Rain.", "a"),
        Example("She left.", "b"),
        Example("The Pope spoke.", "b"),
        Example("His car", "c"),
    ]
    result = augment(examples, ALL)
    assert result.examples == [
        Example("She left.", "b"), Example("He left.", "b"), Example("His car", "c"), Example("Her car", "c"),
    ]  # fmt: skip
    everything = augment(examples, ALL, keep="all")
    assert [example.text for example in everything.examples] == [
        "Rain.", "She left.", "He left.", "The Pope spoke.", "His car", "Her car",
    ]  # fmt: skip
    train, held_out = split_documents(everything.examples, 0.4, seed=1)
    assert held_out
    assert {example.document for example in train}.isdisjoint(example.document for example in held_out)


def test_counts():
    examples = [Example("She saw her mother in the mosque of the Pope.", "d"), Example("Rain.", "d")]
    result = augment(examples, ALL)
    assert (result.texts, result.augmented, result.left) == (2, 1, 1)
    assert result.swaps == {"gender": 3, "race": 0, "religion": 1}
    assert str(result) == (
        "1 of 2 texts (50.0%) have a counterfactual; mentions swapped: gender 3, race 0, religion 1; "
        "left without a counterpart: 1; 2 texts in all"
    )


def test_groups_are_annotated_again_where_they_came_from_the_annotator():
    annotator = GroupAnnotator(["gender"])
    texts = [
        Example("She left.", "d"),
        Example("She saw him.", "d"),
        Example("Her car", "d", ("American_actresses",)),
    ]
    labelled = annotator.label(texts)
    assert [example.groups for example in augment(labelled, GENDER, annotator=annotator).examples] == [
        ("gender:female",), ("gender:male",), ("gender:female", "gender:male"), ("gender:female", "gender:male"),
        ("American_actresses",), ("American_actresses",),
    ]  # fmt: skip
    assert [example.groups for example in augment(labelled[:1], GENDER).examples] == [("gender:female",)] * 2
    assert [example.groups for example in augment(texts[:1], GENDER, annotator=annotator).examples] == [
        None,
        None,
    ]


def test_nothing_to_augment_and_another_keep():
    with pytest.raises(ValueError, match="none of 1 texts has a word with a counterpart in gender"):
        augment([Example("Rain.", "d")], GENDER)
    with pytest.raises(ValueError, match="none of 0 texts"):
        augment([], GENDER, keep="all")
    with pytest.raises(ValueError, match="keep: expected 'augmented' or 'all', got 'some'"):
        augment([Example("She left.", "d")], GENDER, keep="some")


def test_real_sentences(data_dir):
    """A third of BOLD's sentences about actors speak of a gender; none of one gender speaks of the same afterwards."""
    examples = load_corpus(data_dir / "bold" / "gender_wiki.json")
    result = augment(examples, GENDER)
    assert 0.3 < result.augmented / result.texts < 0.6
    assert result.left < 0.01 * result.swaps["gender"]
    kept = 0
    for original, counterfactual in zip(result.examples[::2], result.examples[1::2], strict=True):
        before, after = (
            set(GENDER.annotator.annotate(text)) for text in (original.text, counterfactual.text)
        )
        kept += len(before) == 1 and before <= after
        assert (original.document, original.groups) == (counterfactual.document, counterfactual.groups)
    assert kept == 0
