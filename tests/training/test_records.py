"""Corpora of records: JSONL and parquet, read record by record."""

import json
import os
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.training.data import records, text

EXAMPLES = int(os.environ.get("KVJAX_FUZZ", "60"))
TEXTS = ["one\r\ntwo\n", "grün", "\ufeff a mark within", "x" * 3000]


def write(path, values, field="text"):
    if path.suffix.lower() == ".parquet":
        table = pyarrow.table({"id": list(range(len(values))), field: values})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        lines = [json.dumps({"id": 1, field: value}) for value in values]
        path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(lines).encode() + b"\n")
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "JSONL", "parquet", "Parquet"])
def test_every_record_is_a_text(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", TEXTS)
    assert text.read([path]) == TEXTS
    other = write(tmp_path / f"b.{kind}", ["b", " ", "c"], "body")
    assert text.read([other], field="body") == ["b", "c"]  # a blank one is none


def test_a_record_is_read_when_it_is_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\nno json\n')
    found = records.jsonl(path, "text")
    assert next(found) == "first"
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 is not JSON"):
        next(found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 3 is not JSON"),
        (b"[" * 100_000, "line 3 is not JSON"),
        (b"9" * 5000, "line 3 is not JSON|holds no JSON object"),
        (b'["a"]', "line 3 holds no JSON object with a field 'text'"),
        (b'{"body": "a", "id": 1}', "no field 'text': it has 'body', 'id'; say which"),
        (b"{}", "no field 'text': it has nothing; say which by data.field"),
        (b'{"text": null}', "line 3: field 'text' is NoneType and no text"),
        (b'{"text": ["a"]}', "line 3: field 'text' is list and no text"),
        (b'{"text": "a\\ud800"}', "line 3: .* lone surrogate at character 1"),
        (b'{"text": "\xff"}', "line 3 is not UTF-8: byte 0xff at offset 10"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=message) as caught:
        text.read([str(path)])
    assert "\n" not in str(caught.value)


def test_what_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, ["a", None, "c"])
    with pytest.raises(ValueError, match=r"a\.parquet row 2: field 'text' is NoneType"):
        text.read([str(path)])
    with pytest.raises(ValueError, match="no column 'body': it has 'id', 'text'"):
        text.read([str(path)], field="body")
    with pytest.raises(ValueError, match="row 1: field 'id' is int and no text"):
        text.read([str(path)], field="id")
    for damaged in (b"", b"PAR1", path.read_bytes()[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"a\.parquet is no parquet file"
        ) as caught:
            text.read([str(path)])
        assert "\n" not in str(caught.value)


def test_parquet_without_its_reader(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", ["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'kvjax\[parqu"):
        text.read([path])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
LINES = st.one_of(
    st.binary(),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"text": JSON}).map(lambda x: json.dumps(x).encode()),
    st.text().map(lambda x: json.dumps({"text": x})[:-1].encode()),
)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 100)
@given(lines=st.lists(LINES, max_size=4))
def test_any_lines_are_texts_or_one_error(lines, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        found = list(records.jsonl(path, "text"))
    except ValueError as error:
        found, said = [], str(error)
    else:
        said = str(path)
    assert said.startswith(str(path))  # an error of ours
    assert "\n" not in said
    assert all(isinstance(one, str) for one in found)
    "".join(found).encode()


# --- what is held out


@pytest.mark.parametrize("seed", range(8))
def test_the_end_is_held_out_and_nothing_is_lost(seed):
    rng = np.random.default_rng(seed)
    texts = [
        "".join(rng.choice(list("ab\n"), size=int(size)))
        for size in rng.integers(1, 400, size=7)
    ]
    training, aside = text.split(texts)
    assert "".join(training) + "".join(aside) == "".join(texts)
    total, held = len("".join(texts)), len("".join(aside))
    assert total // 20 <= held <= total // 10 + 1


def test_lines_stay_whole():
    lines = [f"{number} lines\n" for number in range(100)]
    training, aside = text.split(["".join(lines[:50]), "".join(lines[50:])])
    assert training[-1].endswith("\n")
    assert aside == ["".join(lines[95:])]


def test_a_text_without_lines_is_cut_anywhere():
    training, aside = text.split(["head\n" + "x" * 995])
    assert len(aside[0]) == 50
    assert text.split(["abc"]) == (["abc"], [])
    assert text.split([]) == ([], [])
    assert training[0].startswith("head\n")
