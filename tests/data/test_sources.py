import csv
import gzip
import io
import json

import pytest

from jaxrlhf.config import Data
from jaxrlhf.data.sources import read_rows
from jaxrlhf.errors import DataError

ROWS = [{"prompt": "what?", "completion": 'that, "quoted"\nand more ü'}, {"prompt": "who?", "completion": "me"}]


def rows(path, **options):
    return read_rows(Data(path=str(path), **options)).rows


def write_jsonl(path, items=ROWS):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def write_parquet(path, items=ROWS):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(items), path)
    return path


def write_csv(path):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    return path


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_text(text)
    (tmp_path / "dos.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.rstrip().encode()))
    files = [tmp_path / name for name in ("a.json", "lines.json", "dos.jsonl", "a.jsonl.gz")]
    files += [write_jsonl(tmp_path / "a.jsonl"), write_csv(tmp_path / "a.csv"), write_parquet(tmp_path / "a.parquet")]
    for file in files:
        assert rows(file) == ROWS, file


def test_folders(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "split"))
    (tmp_path / "plain" / "data").mkdir(parents=True)
    write_parquet(tmp_path / "plain" / "data" / "train-00000-of-00001.parquet")
    write_jsonl(tmp_path / "plain" / "data" / "test.jsonl", ROWS[:1])
    assert rows(tmp_path / "one") == ROWS
    assert rows(tmp_path / "split", split="test") == ROWS
    assert rows(tmp_path / "plain") == ROWS
    assert rows(tmp_path / "plain", split="test") == ROWS[:1]
    for folder in ("split", "plain"):
        with pytest.raises(DataError, match=r"nosuch.*there are.*test"):
            rows(tmp_path / folder, split="nosuch")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        rows(tmp_path / "empty")


def test_hub(monkeypatch):
    import datasets

    def load_dataset(path, name, split, revision):
        if path == "some/thing":
            assert (name, split, revision) == ("main", "train", "abc")
            return datasets.Dataset.from_list(ROWS)
        raise ConnectionError("no network\nand so on")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows("some/thing", subset="main", revision="abc") == ROWS
    with pytest.raises(DataError, match=r"other/thing: no such file or folder here.*ConnectionError: no network\)"):
        rows("other/thing")
    with pytest.raises(DataError, match=r"data/train.jsonl: no such file"):
        rows("data/train.jsonl")


def test_max_rows_stops_reading(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "not json\n")
    assert rows(path, max_rows=2) == ROWS
    with pytest.raises(DataError, match=r"a\.jsonl:3: not JSON"):
        rows(path)


GOOD = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            GOOD * 36 + b'{"prompt": }\n' + GOOD,
            r'37: not JSON \(Expecting value, column 12\): .\{"prompt": \}.$',
        ),
        ("a.jsonl", GOOD + b'{"prompt": "\xff"}', r"a\.jsonl:2: not UTF-8 \(invalid start byte at byte 13\)"),
        ("a.jsonl", GOOD + rb'{"prompt": "\ud800 x"}', r"a\.jsonl:2: half of a surrogate pair"),
        ("a.jsonl", b'\n{"prompt": "a", "prompt": "b"}', r"a\.jsonl:2: not JSON \(duplicate key 'prompt'\)"),
        ("a.jsonl", b'{"prompt": NaN}', r"a\.jsonl:1: not JSON \(NaN"),
        ("a.jsonl", b"[1, 2]", r"a\.jsonl:1: expected an object .* not a list"),
        ("a.jsonl", b"", r"a\.jsonl: there are no rows"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: there are no rows"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.json", b"[]", r"a\.json: there are no rows"),
        ("a.json", b"", r"a\.json: there are no rows"),
        ("a.json", b'{"data": []}', r"a\.json: expected a list of objects, not an object"),
        ("a.json", b'[{"a": 1},\n 3 4]', r"a\.json: not JSON \(Expecting ',' delimiter, line 2 column 4\)"),
        ("a.json", b'[{"a": 1}, "b"]', r"a\.json row 2: expected an object .* not text"),
        ("a.csv", b"x,y\n1,2\n1,2,3\n", r"a\.csv:3: 3 cells, but the header has 2"),
        ("a.csv", b"x,x\n1,2\n", r"a\.csv: two columns of the header"),
        ("a.csv", b'x,y\n1,"2\n', r"a\.csv:2: not CSV"),
        ("a.csv", b"x,y\n", r"a\.csv: there are no rows"),
        ("a.parquet", b"hello", r"a\.parquet: not a Parquet file"),
        ("a.jsonl.gz", b"hello", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-12], r"a\.jsonl\.gz: cannot be read"),
        ("a.txt", b"hello", r"a\.txt: unknown kind of file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows(tmp_path / name)


def test_a_whole_surrogate_pair_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rb'{"prompt": "\ud83d\ude00"}')
    assert rows(tmp_path / "a.jsonl") == [{"prompt": "\U0001f600"}]


def test_columns_are_renamed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    assert rows(path, columns={"question": "prompt"})[1] == {"question": "who?", "completion": "me"}
    assert rows(path, columns={"prompt": "completion", "completion": "prompt"})[1] == {
        "completion": "who?",
        "prompt": "me",
    }
    with pytest.raises(DataError, match="'nosuch' that the file does not have; it has prompt, completion"):
        rows(path, columns={"text": "nosuch"})
    with pytest.raises(DataError, match="'completion' to 'prompt', which the file already has"):
        rows(path, columns={"prompt": "completion"})


def test_no_path():
    with pytest.raises(DataError, match=r"data.path is not set"):
        read_rows(Data())
