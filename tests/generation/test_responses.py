"""The response file: complete lines count, a partial line does not, and other answers are never overwritten."""

import json

import pytest

from l2m_jax.errors import InputError
from l2m_jax.generation import Answer, ResponseFile, responses

ANSWERS = [Answer(0, 10, (5, 6), "a\nb"), Answer(1, 10, (), ""), Answer(0, 20, (7,), "é\u2028東")]


@pytest.fixture
def file(tmp_path):
    return ResponseFile(tmp_path / "new" / "responses.jsonl", "x")


def add(file, answers):
    with file.appending() as append:
        append(answers)


def test_what_is_added_is_read_back(file):
    assert file.read() == [] and not file.path.exists()
    with file.appending() as append:
        append(ANSWERS[:1])
        assert file.read() == ANSWERS[:1]  # on disk at once, not when the file is closed
        append(ANSWERS[1:])
    assert file.read() == ANSWERS
    add(file, [])
    assert file.read() == ANSWERS


@pytest.mark.parametrize("block", [3, 1 << 16])
def test_a_partial_line_is_dropped_wherever_it_ends(file, monkeypatch, block):
    monkeypatch.setattr(responses, "_BLOCK", block)  # read at once from the end of the file
    add(file, ANSWERS)
    complete = file.path.read_bytes()
    last_line = complete.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last_line, len(complete)):
        file.path.write_bytes(complete[:cut])
        assert file.read() == ANSWERS[:2]
        add(file, ANSWERS[2:])
        assert file.path.read_bytes() == complete


def test_an_answer_is_read_from_its_place_alone(file):
    add(file, ANSWERS)
    places = [place for place, _ in file.lines()]
    assert [file.answer_at(place) for place in reversed(places)] == ANSWERS[::-1]
    for wrong in (0, places[1] + 1, 10**6):
        with pytest.raises(InputError, match=r"delete .*responses\.jsonl to make them again"):
            file.answer_at(wrong)


@pytest.mark.parametrize("header", ["", '{"ke', '{"key": "y"}'])
def test_a_partial_header_starts_again(file, header):
    file.path.parent.mkdir()
    file.path.write_text(header)
    assert file.read() == []
    add(file, ANSWERS)
    assert file.read() == ANSWERS


def test_answers_with_another_key_are_refused_and_kept(file):
    add(file, ANSWERS)
    content = file.path.read_bytes()
    with pytest.raises(
        InputError,
        match=r"responses\.jsonl: holds answers of another model.*or delete .*jsonl to make them again",
    ):
        ResponseFile(file.path, "y").read()
    assert file.path.read_bytes() == content


@pytest.mark.parametrize("text", ["hello\n", '{"instruction": "x"}\n', '{"key": "x"}\n[1]\n'])
def test_a_file_of_another_kind_is_refused_and_kept(file, text):
    file.path.parent.mkdir()
    file.path.write_text(text)
    with pytest.raises(InputError, match=r"responses\.jsonl: not a file of generated answers"):
        file.read()
    assert file.path.read_text() == text


def test_lines_are_plain_json(file):
    add(file, ANSWERS)
    lines = file.path.read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0]) == {"key": "x"}
    line = json.loads(lines[1])
    assert line.pop("crc32") > 0 and line == {"prompt": 0, "seed": 10, "tokens": [5, 6], "text": "a\nb"}


@pytest.mark.parametrize(("old", "new"), [("[5, 6]", "[5, 7]"), ("東", "西"), ('"seed": 20', '"seed": 21')])
def test_a_changed_answer_is_refused(file, old, new):
    add(file, ANSWERS)
    content = file.path.read_text(encoding="utf-8")
    assert content.count(old) == 1
    file.path.write_text(content.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match="an answer differs from what was written"):
        file.read()
