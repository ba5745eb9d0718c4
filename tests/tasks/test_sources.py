"""The Cauldron's loader and a user's own files, on data made here in the same layout."""

import base64
import io
import json
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image

from lvnas.errors import InputError
from lvnas.tasks import load_task


def pictures(count):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8)) for _ in range(count)]


def cauldron_rows(count):
    return [
        {
            "images": [picture],
            "texts": [
                {"user": f"Question {number}-{turn}?", "assistant": f"Answer {number}.", "source": "vsr"}
                for turn in range(2)
            ],
        }
        for number, picture in enumerate(pictures(count))
    ]


def png_of_size(width, height):
    """A PNG that says its size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", b""))
    )


def image_sets(task):
    return {
        split: {example.images[0].tobytes() for example in examples}
        for split, examples in task.splits.items()
    }


def test_cauldron_is_split_by_image(tmp_path, monkeypatch):
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List(
                {key: datasets.Value("string") for key in ("user", "assistant", "source")}
            ),
        }
    )
    rows = cauldron_rows(60)
    (tmp_path / "vsr").mkdir()
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "vsr" / "train-00000-of-00001.parquet")
    monkeypatch.setenv("LVNAS_CAULDRON", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = load_task("vsr")
    sets = image_sets(task)
    assert sum(map(len, sets.values())) == 60
    assert (
        not sets["train"] & sets["test"]
        and not sets["train"] & sets["search"]
        and not sets["search"] & sets["test"]
    )
    assert sum(map(len, task.splits.values())) == 120
    assert len(sets["train"]) > 30 and sets["search"] and sets["test"]
    assert task.metric == "yes_no"
    assert load_task("vsr", {"train": 3}).splits["train"] == task.splits["train"][:3]
    with pytest.raises(InputError, match="tqa"):
        load_task("tqa")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_users_own_file(tmp_path, kind):
    rows = []
    for number, row in enumerate(cauldron_rows(60)):
        buffer = io.BytesIO()
        row["images"][0].save(buffer, "PNG")
        if kind == "parquet":
            image = {"bytes": buffer.getvalue(), "path": None}
        elif number % 2:
            image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        else:
            image = f"{number}.png"
            (tmp_path / image).write_bytes(buffer.getvalue())
        rows.append({"images": [image], "texts": row["texts"]})
    path = tmp_path / f"mine.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    task = load_task(str(path))
    sets = image_sets(task)
    assert sum(map(len, sets.values())) == 60
    assert not sets["train"] & sets["test"]
    originals = {picture.tobytes() for picture in pictures(60)}
    assert set.union(*sets.values()) == originals


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "row 1"),
        ('{"images": ["missing.png"], "texts": []}', "missing.png"),
        ('{"images": [], "texts": [{"user": "?"}]}', "assistant"),
        ('{"images": ["data:image/png;base64,!!"], "texts": []}', "row 1"),
        ('{"images": [5], "texts": []}', "row 1: TypeError: image 5; expected"),
        ('{"images": [null], "texts": []}', "row 1: TypeError: image None"),
        ('{"images": ["huge.png"], "texts": []}', "row 1: DecompressionBombError"),
        (
            '{"images": [], "texts": [{"user": "?", "assistant": "!"}]}',
            "row 1: .*no image; every row needs one",
        ),
        (
            '{"images": ["one.png"], "texts": [{"user": "a <|image|>?", "assistant": "!"}]}',
            r"row 1: .*a text holds <\|image\|>",
        ),
        ('{"images": [' + "9" * 5000 + "]}", "line 1: not JSON"),
    ],
)
def test_broken_rows_are_named(tmp_path, line, said):
    path = tmp_path / "mine.jsonl"
    path.write_text(line)
    pictures(1)[0].save(tmp_path / "one.png")
    (tmp_path / "huge.png").write_bytes(png_of_size(20_000, 20_000))
    with pytest.raises(InputError, match=said):
        load_task(str(path))


def test_too_few_images(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("")
    with pytest.raises(InputError, match="too few images"):
        load_task(str(path))
    with pytest.raises(InputError, match="no such file"):
        load_task(str(tmp_path / "none.parquet"))


def test_files_that_are_damaged(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"images": ["é.png"]}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl is not UTF-8 .* at byte 13"):
        load_task(str(tmp_path / "latin.jsonl"))
    path = tmp_path / "mine.parquet"
    datasets.Dataset.from_dict({"images": [["a.png"] * 1000] * 50, "texts": [[]] * 50}).to_parquet(path)
    data = bytearray(path.read_bytes())
    for start, length in ((4, 40), (len(data) // 3, 60), (len(data) - 60, 40), (0, 4)):
        path.write_bytes(data[:start] + b"\xff" * length + data[start + length :])
        with pytest.raises(InputError, match=r"mine\.parquet"):
            load_task(str(path))


def test_a_line_separator_within_a_text(tmp_path):
    pictures(1)[0].save(tmp_path / "one.png")
    row = {"images": ["one.png"], "texts": [{"user": "a\u2028b", "assistant": "c"}]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row, ensure_ascii=False))
    with pytest.raises(InputError, match="too few images"):  # the row itself is one
        load_task(str(tmp_path / "mine.jsonl"))
