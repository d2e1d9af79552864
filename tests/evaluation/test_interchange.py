"""Tasks in kvpress's columns: written, read again, and refused in one line."""

import json

import pytest
from tiny import ByteTokenizer, byte_tokenizer

from kvjax.evaluation.tasks import interchange, ruler
from kvjax.evaluation.tasks.ruler.fitting import Kind

BYTES = ByteTokenizer()
COLUMNS = ["context", "question", "answer_prefix", "answer", "task", "max_new_tokens"]
ROW = {
    "context": "The key is under the mat.\n",
    "question": "Where is it?",
    "answer_prefix": " It is",
    "answer": ["mat", "under the mat"],
    "task": "qa_9",
    "max_new_tokens": 7,
    "length": 40,  # what is not asked for does not matter
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_is_written_is_read(tmp_path, suffix):
    made = [
        *ruler.examples("vt", BYTES, context=4000, n=2),
        *ruler.examples("qa_1", BYTES, context=2000, n=1),
    ]
    path = tmp_path / f"tasks{suffix}"
    interchange.write(path, made)
    rows = interchange.read(path)
    assert [(parts, kind) for parts, kind, _ in rows] == [
        (x.parts, x.kind) for x in made
    ]
    assert interchange.examples(BYTES, rows, context=4000) == made
    # In the other's hands: the columns, and lists of texts.
    if suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    else:
        import pyarrow.parquet

        records = pyarrow.parquet.read_table(path).to_pylist()
    for record, one in zip(records, made, strict=True):
        assert list(record) == COLUMNS
        assert record["answer"] == list(one.answers)
        assert record["max_new_tokens"] == one.answer_tokens
        whole = record["context"] + record["question"] + record["answer_prefix"]
        assert whole.rstrip(" ") == one.text


def test_rows_of_kvpress_are_examples(tmp_path):
    other = ROW | {"task": "vt", "answer": "mat", "max_new_tokens": 3.0}
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "1.jsonl", ROW, other, ROW)
    write(tmp_path / "a.jsonl", ROW)
    rows = interchange.read(tmp_path, n=2)
    assert [kind for _, kind, _ in rows] == [
        Kind("qa_9", 7, is_any=True),
        Kind("qa_9", 7, is_any=True),
        Kind("vt", 3, is_any=False),
    ]
    assert [where for *_, where in rows] == [
        "a.jsonl, line 1",
        "1.jsonl, line 1",
        "1.jsonl, line 2",
    ]
    first, _, last = interchange.examples(BYTES, rows, context=60)
    assert first.text == "The key is under the mat.\nWhere is it? It is"
    assert first.asked_at == len(ROW["context"])
    assert first.score(" on the MAT") == 1
    assert last.answers == ("mat",)
    (chat, *_) = interchange.examples(byte_tokenizer(), rows, context=80, is_chat=True)
    assert chat.text == "<user>The key is under the mat.\nWhere is it?It is"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": 3}, "f.jsonl, line 1: task=3 must be a text"),
        ({"answer": []}, r"answer=\[\] must be a text, or several"),
        ({"answer": None}, "answer=None must be a text, or several"),
        ({"answer": ["a", " "]}, "an answer says nothing"),
        (
            {"max_new_tokens": 0},
            "max_new_tokens=0 must be a whole number of at least 1",
        ),
        ({"max_new_tokens": True}, "max_new_tokens=True must be"),
        ({"max_new_tokens": "7"}, "max_new_tokens='7' must be a whole number"),
        ({"context": "", "question": " "}, "context and question say nothing"),
        ({"context": "\ud800"}, "context holds half of a surrogate pair"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, change, message):
    path = write(tmp_path / "f.jsonl", ROW | change)
    with pytest.raises(ValueError, match=message):
        interchange.read(path)


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    import pyarrow
    import pyarrow.parquet

    short = {"context": "a", "question": "b", "answer": "c", "task": "d"}
    message = (
        "has no answer_prefix and no max_new_tokens, only context, question, answer, "
        "task"
    )
    path = write(tmp_path / "f.jsonl", short)
    with pytest.raises(ValueError, match=f"f.jsonl, line 1 {message}"):
        interchange.read(path)
    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([short]), path)
    with pytest.raises(ValueError, match=f"f.parquet {message}"):
        interchange.read(path)


def test_what_is_no_file_of_tasks(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"gone\.jsonl is no file and no folder"
    ):
        interchange.read(tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match=r"has no \.jsonl and no \.parquet fil"):
        interchange.read(tmp_path)
    with pytest.raises(ValueError, match=r"x\.csv must end in \.jsonl or \.parquet"):
        interchange.write(tmp_path / "x.csv", [])
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="is no parquet file, or damaged: "):
        interchange.read(tmp_path / "x.parquet")
    for content, message in [
        ("", "empty.jsonl has no row"),
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1 is a list, and must be an object with the keys context, "),
    ]:
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            interchange.read(tmp_path / "empty.jsonl")


def test_a_row_that_does_not_fit_is_named(tmp_path):
    rows = interchange.read(write(tmp_path / "f.jsonl", ROW))
    message = "f.jsonl, line 1: its prompt has 44 tokens; with max_new_tokens=7 that ex"
    with pytest.raises(ValueError, match=message):
        interchange.examples(BYTES, rows, context=50)


def test_a_path_is_told_from_a_task(tmp_path):
    for path in ("x.jsonl", "a/b.parquet", "data/", str(tmp_path)):
        assert interchange.is_path(path)
    for task in ("passkey", "ruler", "niah_single_1"):
        assert not interchange.is_path(task)
