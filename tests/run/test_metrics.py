import json
import math
import random
import struct

import numpy as np
import pytest
import torch

from gardo.run.metrics import MetricsWriter, read_metrics, to_json_line, write_atomic


def test_rows_come_back_and_each_is_one_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [
        {"epoch": 0, "kl": 0.1, "note": "a\nb\u2028c", "list": [1, 2.5], "ok": True},
        {"epoch": 1, "kl": None},
    ]
    with MetricsWriter(path) as writer:
        for row in rows:
            writer.write(row)
    assert path.read_text().count("\n") == 2
    assert read_metrics(path) == rows


def test_a_reader_sees_whole_lines_while_the_run_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for epoch in range(3):
            writer.write({"epoch": epoch})
            # before any close or flush
            assert [r["epoch"] for r in read_metrics(path)] == list(range(epoch + 1))
            assert path.read_bytes().endswith(b"}\n")


def test_floats_are_bitwise_the_same_after_a_round_trip(tmp_path):
    draw = random.Random(0)
    values = []
    while len(values) < 500:  # all exponents, from random bits
        value = struct.unpack("<d", draw.getrandbits(64).to_bytes(8, "little"))[0]
        if math.isfinite(value):
            values.append(value)
    values += [0.1, -0.0, 5e-324, 1.7976931348623157e308, float(np.float32(0.1))]
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"epoch": 0, "values": values})
    back = read_metrics(path)[0]["values"]
    assert [struct.pack("<d", v) for v in back] == [struct.pack("<d", v) for v in values]


def test_not_finite_becomes_null_also_from_arrays_and_tensors():
    row = {
        "epoch": 0,
        "a": math.nan,
        "b": -math.inf,
        "c": np.float32("nan"),
        "d": torch.tensor(float("inf")),
        "e": torch.tensor(0.5, dtype=torch.bfloat16),
        "f": np.int64(3),
        "g": {"h": [math.nan, 1.0]},
    }
    assert json.loads(to_json_line(row), parse_constant=pytest.fail) == {
        "epoch": 0,
        "a": None,
        "b": None,
        "c": None,
        "d": None,
        "e": 0.5,
        "f": 3,
        "g": {"h": [None, 1.0]},
    }


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.zeros(2), np.zeros((1,)), b"x"])
def test_values_that_json_lacks_are_named(value):
    with pytest.raises(TypeError, match="odd"):
        to_json_line({"epoch": 0, "odd": value})


@pytest.mark.parametrize("row", [{}, {"epoch": 1.0}, {"epoch": None}, {"epoch": True}])
def test_a_row_needs_an_integer_epoch(tmp_path, row):
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ValueError, match="epoch"):
        writer.write(row)
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_resume_drops_later_epochs_and_keeps_the_bytes_of_the_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    # 1e-4 would be written as 0.0001: kept lines must not be written anew
    path.write_text('{"epoch": 0, "kl": 1e-4}\n{"epoch":1}\n{"epoch": 2}\n{"epoch": 3, "kl"')
    with MetricsWriter(path, resume_epoch=2) as writer:
        writer.write({"epoch": 2, "kl": 0.5})
    assert path.read_text() == '{"epoch": 0, "kl": 1e-4}\n{"epoch":1}\n{"epoch": 2, "kl": 0.5}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file is left


def test_resume_of_a_file_that_is_not_there_starts_one(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl", resume_epoch=4) as writer:
        writer.write({"epoch": 4})
    assert read_metrics(tmp_path / "m.jsonl") == [{"epoch": 4}]


def test_a_second_run_in_the_same_file_is_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"epoch": 0}\n')
    with pytest.raises(FileExistsError, match="resume_epoch"):
        MetricsWriter(path)
    assert path.read_text() == '{"epoch": 0}\n'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"epoch": 0}\n{"epoch":\n{"epoch": 2}\n', 2),
        ('{"epoch": 0}\n\n[1]\n', 3),
        ('{"epoch": 0, "kl": NaN}\n', 1),
        ('{"epoch": 0}\n{"epoch": 1', 2),
    ],
)
def test_malformed_content_names_file_and_line(tmp_path, text, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line {line}:"):
        read_metrics(path)


def test_bytes_that_are_no_text_name_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 0}\n{"a": "\xff"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not UTF-8"):
        read_metrics(path)


def test_only_an_unfinished_last_line_can_be_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0}\n{"epoch": 1')
    assert read_metrics(path, ignore_unfinished=True) == [{"epoch": 0}]
    path.write_text('{"epoch": 0}\n{"epoch": 1\n')  # finished, and wrong
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path, ignore_unfinished=True)


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("gardo.run.metrics.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
