"""Prompts from files and folders: what is read, and every mistake with its file and line."""

from __future__ import annotations

import pytest

from gardo.config import PromptsConfig
from gardo.data.files import read_prompt_file, read_prompts
from gardo.data.prompts import load_prompts
from gardo.types import UserError


def test_text_files_with_every_kind_of_line_end(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffone café\n  two blue squares \r\nthree\u2028parts\n\n \r\n".encode())
    prompts = read_prompt_file(file)
    # U+2028 is no line end; blank lines may end the file
    assert [p.text for p in prompts] == ["one café", "two blue squares", "three\u2028parts"]
    assert [p.origin for p in prompts] == [f"{file}, line {n}" for n in (1, 2, 3)]
    assert all(p.metadata == {} for p in prompts)


def test_records_keep_their_metadata(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"tag": "counting", "prompt": "a dog", "include": [{"class": "dog"}]}\n\n')
    (prompt,) = read_prompt_file(file)
    assert prompt.text == "a dog"
    assert prompt.metadata == {"tag": "counting", "include": [{"class": "dog"}]}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "at least one prompt"),
        ("a.txt", b"\n \n", "at least one prompt"),
        ("a.txt", b"ok\n\xff\xfe\n", "line 2: expected UTF-8"),
        ("a.txt", b"\xefcaf\xe9", "line 1: expected UTF-8"),
        ("a.txt", b"ok\n\nok\n", "line 2: expected a prompt, got an empty line"),
        ("a.txt", b"\nok\n", "line 1: expected a prompt, got an empty line"),
        ("a.jsonl", b'{"prompt": "x"}\n \n{"prompt": "y"}', "line 2: expected a JSON object, got"),
        ("a.jsonl", b'{"prompt": "x"}\n{oops\n', "line 2: expected a JSON object (Expecting"),
        ("a.jsonl", b'{"prompt": "x"} {"prompt": "y"}\n', "line 1: expected a JSON object (Extra"),
        ("a.jsonl", b'["x"]\n', "line 1: expected a JSON object"),
        ("a.jsonl", b'{"prompt": " "}\n', "line 1: expected a JSON object with a non-empty"),
        ("a.jsonl", b'{"prompt": 3}\n', "non-empty string"),
        ("a.jsonl", b'{"text": "x"}\n', "non-empty string"),
        ("a.csv", b"x\n", "expected a .txt or .jsonl file"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        read_prompt_file(tmp_path / name)
    assert expected in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.txt' does not exist"):
        read_prompts(tmp_path / "nowhere.txt", "train")
    with pytest.raises(UserError, match="expected a .txt or .jsonl file"):
        read_prompts(tmp_path / "nowhere", "train")


def test_folders_are_read_by_split(tmp_path):
    (tmp_path / "train.txt").write_text("a train prompt\n")
    (tmp_path / "test.txt").write_text("a test prompt\n")
    config = PromptsConfig(path=str(tmp_path), per_epoch=1)
    assert config.split == "train"
    assert [p.text for p in load_prompts(config)] == ["a train prompt"]
    test = config.model_copy(update={"split": "test"})
    assert [p.text for p in load_prompts(test)] == ["a test prompt"]
    # records say more than texts
    (tmp_path / "test_metadata.jsonl").write_text('{"prompt": "a test record", "tag": "x"}\n')
    assert [(p.text, p.metadata) for p in load_prompts(test)] == [("a test record", {"tag": "x"})]
    with pytest.raises(UserError, match="expected val_metadata.jsonl or val.txt"):
        read_prompts(tmp_path, "val")


def test_duplicates_count_once_and_keep_their_place(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a\nb\na\n")
    config = PromptsConfig(path=str(file), per_epoch=2)
    prompts = load_prompts(config)
    assert [p.text for p in prompts] == ["a", "b"]
    assert prompts[0].origin.endswith("line 1")
    with pytest.raises(UserError, match="at most the 2 distinct prompts"):
        load_prompts(config.model_copy(update={"per_epoch": 3}))


def test_the_same_text_with_other_metadata_is_another_prompt(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "n": 1}\n{"prompt": "a", "n": 2}\n')
    assert len(load_prompts(PromptsConfig(path=str(file), per_epoch=1))) == 2


def test_a_path_goes_before_a_generator(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a\n")
    config = PromptsConfig(path=str(file), generator="shapes", per_epoch=1)
    assert [p.text for p in load_prompts(config)] == ["a"]
