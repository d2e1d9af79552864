"""Every method can be cited, and kvjax too, from one table.

`python tests/test_citations.py` writes `CITATION.cff` anew.
"""

import pathlib
import re

import pytest
import yaml

import kvjax
from kvjax import registry
from kvjax.registry import citations
from kvjax.registry.describe import describe

FILE = pathlib.Path(__file__).parents[1] / "CITATION.cff"
NAMES = (*registry.names(), *registry.transforms())


def fields(entry: str) -> dict[str, str]:
    """The fields of one BibTeX entry whose braces match."""
    for depth in range(len(entry)):
        assert entry[:depth].count("{") >= entry[:depth].count("}")
    assert entry.count("{") == entry.count("}")
    kind, key, body = re.fullmatch(r"@(\w+)\{(\w+),\n(.*)\}", entry, re.DOTALL).groups()
    found = dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.MULTILINE))
    assert len(found) == len(body.splitlines())
    return found | {"kind": kind, "key": key}


@pytest.mark.parametrize("name", NAMES)
def test_every_paper_that_a_method_names_has_an_entry(name):
    source = describe(registry.get(name)).source
    ids = citations.arxiv_ids(source)
    assert ids
    for arxiv, text in zip(ids, citations.entries(source), strict=True):
        entry = fields(text)
        assert entry["eprint"] == arxiv
        assert entry["year"] == f"20{arxiv[:2]}"
        assert entry["url"].endswith(arxiv)


def test_the_table_says_what_the_docstrings_say():
    """Surnames and titles as the sources of the methods spell them."""
    sources = {name: describe(registry.get(name)).source for name in NAMES}
    named = set()
    for source in sources.values():
        named |= set(citations.arxiv_ids(source))
        # "Names, "Title", where, arXiv:id" and whatever follows.
        for who, title, arxiv in re.findall(
            r'(?:^|[.:] )([^".:]*(?:et al\.)?), "([^"]+),?"[^"]*?arXiv:(\d{4}\.\d{5})',
            source,
        ):
            if arxiv not in citations.PAPERS:  # cited by these very words
                continue
            paper = citations.PAPERS[arxiv]
            assert paper.title.startswith(title.rstrip(",")), arxiv
            surnames = re.findall(r"\w+", who.replace("et al.", ""))
            assert surnames == [a.split()[-1] for a in paper.authors[: len(surnames)]]
    assert set(citations.PAPERS) <= named


def test_keys_are_unique_and_plain():
    keys = [fields(citations.paper_entry(arxiv))["key"] for arxiv in citations.PAPERS]
    assert len(set(keys)) == len(keys)
    assert all(key.isascii() for key in keys)
    assert "tang2024quest" in keys


def test_the_file_at_the_top_is_the_entry_of_kvjax():
    assert FILE.read_text("utf-8") == citations.citation_file(kvjax.__version__)
    document = yaml.safe_load(FILE.read_text("utf-8"))
    entry = fields(citations.software_entry(kvjax.__version__))
    assert document["title"] == entry["title"].strip("{}")
    assert document["version"] == entry["version"] == kvjax.__version__
    assert document["license"] == entry["license"]
    assert [a["name"] for a in document["authors"]] == [entry["author"].strip("{}")]
    assert {"cff-version", "message"} <= set(document)


def test_an_unknown_paper_is_named():
    with pytest.raises(
        ValueError, match=r"arxiv='0000\.00000' is not among the papers"
    ):
        citations.paper_entry("0000.00000")


def test_a_paper_without_authors_in_the_table_is_cited_by_its_source():
    source = (
        'Somebody, van der Berg, "A New Way, in Two Steps", NeurIPS 2031, '
        'arXiv:3101.00001. Pages: Other et al., "Of Pages", arXiv:3102.00002, Sec. 3. '
        "See arXiv:3103.00003."
    )
    first, second, third = map(fields, citations.entries(source))
    assert first["key"] == "somebody2031a"
    assert first["author"] == "Somebody and van der Berg"
    assert first["title"] == "{A New Way, in Two Steps}"
    assert second["author"] == "Other and others"
    assert second["eprint"] == "3102.00002"
    assert third["title"] == "{arXiv:3103.00003}"
    assert "author" not in third


if __name__ == "__main__":
    FILE.write_text(citations.citation_file(kvjax.__version__), "utf-8")


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    "given", [3, None, registry.get("quest"), registry.parse("full")]
)
def test_what_is_no_text_cannot_be_cited(given):
    with pytest.raises(TypeError, match="must be text such as 'quest:budget=128'"):
        kvjax.cite("quest", given)
