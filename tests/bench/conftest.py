import json

import pytest

from l2m_jax.bench.workload import Request, make_request
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.models.hf import gpt2


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> tuple[Request, dict]:
    """A request of two batches of three examples for a tiny pair, and the arguments that it came from."""
    folder = tmp_path_factory.mktemp("work")
    rows = [
        {"instruction": f"say {word} {i} times", "output": " ".join([word] * i)}
        for i in range(1, 5)
        for word in ("yes", "no")
    ]
    rows.append({"instruction": "go on", "output": "on " * 600})  # longer than a row
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = folder / "tokenizer"
    vocabulary = train_tokenizer([str(row) for row in rows], 300)
    vocabulary.save_pretrained(tokenizer)
    arguments = {"data": data, "tokenizer": tokenizer}
    for name, width in (("student", 16), ("teacher", 24)):
        arguments[name] = gpt2.read_config(
            {"n_layer": 2, "n_embd": width, "n_head": 2, "vocab_size": len(vocabulary), "n_positions": 512}
        )
    request = make_request(
        folder,
        data,
        tokenizer,
        batches=2,
        batch_size=3,
        student=arguments["student"],
        teacher=arguments["teacher"],
    )
    return request, arguments
