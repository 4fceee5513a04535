"""A few hundred mutated inputs for each parser; `fuzz.py` runs as many as it is told to."""

import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fuzz

from l2m_jax.errors import InputError
from l2m_jax.files import parse_json


@pytest.mark.parametrize("name", fuzz.PARSERS)
def test_mutated_inputs_are_read_or_refused(name):
    found = fuzz.fuzz(name, 200, seed=1)
    assert not found["failures"]
    assert found["read"] + found["refused"] == 200
    assert found["read"] and found["refused"] > 20


def test_the_harness_sees_errors_hangs_and_memory(monkeypatch):
    """A parser that fails in each of these ways on sound input as well."""

    def fails(data: bytes) -> None:
        if b"memory" in data:
            bytearray(1 << 31)
        if b"hang" in data:
            while True:
                pass
        raise KeyError(data)

    for seed, error in ((b"memory", "MemoryError"), (b"hang", "Hang"), (b"other", "KeyError")):
        parser = fuzz.Parser([], fails, lambda generator, data: data)
        monkeypatch.setattr(fuzz, "SECONDS", 0.2)
        monkeypatch.setitem(fuzz.PARSERS, "wrong", lambda folder, parser=parser: parser)
        monkeypatch.setattr(fuzz, "mutate", lambda generator, parser, seed=seed: seed)
        found = fuzz.fuzz("wrong", 1, seed=0, memory=256)
        assert found["failed"] == 1 and found["failures"][0]["error"].startswith(error)


def test_headers_that_claim_terabytes_take_no_memory(tmp_path):
    import gguf

    from l2m_jax.models.hf.gguf import GgufFile
    from l2m_jax.models.hf.safetensors_folder import SafetensorsFolder

    assert gguf.GGUF_MAGIC  # imported before the limit
    header = b'{"wte.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    texts = [struct.pack("<Q", 1 << 42) + b"{}", struct.pack("<Q", len(header)) + header]
    array = struct.pack("<QIQ", 1, 9, 0)[:8] + b"a" + struct.pack("<IIQ", 9, 0, 1 << 42)
    with fuzz.limited(64):
        for text in texts:
            (tmp_path / "model.safetensors").write_bytes(text)
            with pytest.raises(InputError, match="fetch it again"):
                SafetensorsFolder(tmp_path, "transformer.", None)
        for counts in (struct.pack("<QQ", 1 << 42, 0), struct.pack("<QQ", 0, 1) + array):
            (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + counts)
            with pytest.raises(InputError, match="fetch it again"):
                GgufFile(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "text", [b'"\\ud800"', b"\xed\xa0\x80", b"[" * 100_000, b"\xff\xfe", b"", b"1" * 5000]
)
def test_what_python_reads_as_json_but_no_file_can_hold(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_byte_order_mark_and_surrogate_pairs_are_read():
    assert parse_json(b'\xef\xbb\xbf"\\ud83c\\udf50"') == "🍐"
