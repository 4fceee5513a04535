"""The response file: complete lines count, half a line does not, foreign answers are replaced."""

import json

import pytest

from l2m_jax.errors import InputError
from l2m_jax.generation import Answer
from l2m_jax.generation.responses import ResponseFile, read

ANSWERS = [Answer(0, 10, (5, 6), "a\nb"), Answer(1, 10, (), ""), Answer(0, 20, (7,), "é\u2028東")]


def test_what_is_added_is_read_back(tmp_path):
    path = tmp_path / "new" / "responses.jsonl"
    with ResponseFile(path, "made of x") as file:
        assert file.answers == []
        file.add(ANSWERS[:1])
        assert read(path) == ("made of x", ANSWERS[:1])  # on disk at once, not when the file is closed
        file.add(ANSWERS[1:])
    assert read(path) == ("made of x", ANSWERS)
    with ResponseFile(path, "made of x") as file:
        assert file.answers == ANSWERS
    assert read(path) == ("made of x", ANSWERS)


def test_half_a_line_is_dropped_wherever_it_ends(tmp_path):
    path = tmp_path / "responses.jsonl"
    with ResponseFile(path, "x") as file:
        file.add(ANSWERS)
    complete = path.read_bytes()
    last_line = complete.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last_line, len(complete)):
        path.write_bytes(complete[:cut])
        with ResponseFile(path, "x") as file:
            assert file.answers == ANSWERS[:2]
            file.add(ANSWERS[2:])
        assert path.read_bytes() == complete


def test_a_header_cut_off_starts_again(tmp_path):
    path = tmp_path / "responses.jsonl"
    path.write_text('{"made_fr')
    with ResponseFile(path, "x") as file:
        file.add(ANSWERS)
    assert read(path) == ("x", ANSWERS)


def test_answers_made_from_something_else_are_replaced(tmp_path, capsys):
    path = tmp_path / "responses.jsonl"
    with ResponseFile(path, "x") as file:
        file.add(ANSWERS)
    with ResponseFile(path, "y") as file:
        assert file.answers == []
        file.add(ANSWERS[:1])
    assert read(path) == ("y", ANSWERS[:1])
    assert "starting again" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["hello\n", '{"instruction": "x"}\n', '{"made_from": "x"}\n[1]\n'])
def test_a_file_of_another_kind_is_left_alone(tmp_path, text):
    path = tmp_path / "responses.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=r"responses\.jsonl"):
        ResponseFile(path, "x")
    assert path.read_text() == text


def test_lines_are_plain_json(tmp_path):
    path = tmp_path / "responses.jsonl"
    with ResponseFile(path, "x") as file:
        file.add(ANSWERS)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[1]) == {"prompt": 0, "seed": 10, "tokens": [5, 6], "text": "a\nb"}
