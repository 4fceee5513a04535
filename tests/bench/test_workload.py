import jax
import numpy as np
import pytest

from l2m_jax import models
from l2m_jax.bench.workload import ROW_LENGTH, Request, make_request, padded_flops, step_flops
from l2m_jax.data.batches import ListedExamples
from l2m_jax.errors import InputError


def test_rows_that_fit_in_batches(work, tmp_path):
    request, _ = work
    assert sorted(i for batch in request.batches for i in batch) == list(range(6))
    for tokens, prompt in zip(request.tokens, request.prompt_lengths, strict=True):
        assert 0 < prompt < len(tokens) <= ROW_LENGTH and tokens[-1] == request.eos
    request.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == request


def test_flops_by_counting_parameters(work):
    request, arguments = work
    examples = ListedExamples([np.array(t) for t in request.tokens], np.array(request.prompt_lengths))

    def matrices(config):
        blocks = models.init(config, jax.random.key(0))["blocks"]
        return sum(p.size for path, p in jax.tree.leaves_with_path(blocks) if path[-1].key == "kernel")

    tokens = sum(map(len, request.tokens)) / 2
    targets = tokens - sum(request.prompt_lengths) / 2
    flops = step_flops(arguments["student"], arguments["teacher"], examples, request.batches)
    assert flops["student_body"] == 6 * tokens * matrices(arguments["student"])
    assert flops["teacher_body"] == 2 * tokens * matrices(arguments["teacher"])
    vocabulary = arguments["student"].vocab_size
    assert flops["student_head"] == 6 * targets * vocabulary * 16
    assert flops["teacher_head"] == 2 * targets * vocabulary * 24

    lengths, batches = examples.lengths, np.array(request.batches)
    a_token = 6 * (matrices(arguments["student"]) + vocabulary * 16)
    a_token += 2 * (matrices(arguments["teacher"]) + vocabulary * 24)
    models_of = (arguments["student"], arguments["teacher"])
    assert padded_flops(*models_of, lengths, batches, padded_to=512) == 3 * 512 * a_token
    longest = [max(len(request.tokens[i]) for i in batch) for batch in request.batches]
    assert padded_flops(*models_of, lengths, batches) == 3 * np.mean(longest) * a_token


def test_too_few_rows(work, tmp_path):
    _, a = work
    with pytest.raises(InputError, match=r"8 rows of at most 512 tokens, 10 are needed"):
        make_request(
            tmp_path, a["data"], a["tokenizer"], batches=2, batch_size=5,
            student=a["student"], teacher=a["teacher"],
        )  # fmt: skip
