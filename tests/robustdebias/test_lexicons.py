"""The lexicons that come with the package: what they find, what they leave alone, how precise they are."""
from __future__ import annotations
from pathlib import Path
import pytest
from robustdebias.groups import GroupAnnotator, builtin_lexicons, load_lexicon
FIXTURES = Path(__file__).parent / "fixtures"
LEXICONS = builtin_lexicons()
def sentences(lexicon):
    lines = (FIXTURES / f"mentions_{lexicon}.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if not line.startswith("#")]
    return [(set(classes.split(",")) - {"none"}, sentence) for classes, sentence in pairs]
@pytest.mark.parametrize("lexicon", LEXICONS)
def test_s(lexicon):
    annotator = GroupAnnotator([lexicon])
    bad=[]
    for classes, sentence in sentences(lexicon):
        found = {m.group.split(":")[1] for m in annotator.spans(sentence)}
        if found!=classes: bad.append((classes,[sentence[m.start:m.end]+"="+m.group for m in annotator.spans(sentence)],sentence))
    assert not bad, "\n".join(map(str,bad))
