"""Slots, refills and prefill batches, without a model: answers have given lengths."""

import numpy as np
import pytest

from l2m_jax.errors import InputError
from l2m_jax.generation.schedule import Schedule, bucket


def simulate(lengths, answers, *, devices=1, slots=64, max_new_tokens=128, prefill_tokens=2048):
    """Runs a schedule whose answer to (prompt, seed) has `answers[prompt][seed]` tokens, the end included."""
    seeds = {p: list(range(len(of_prompt))) for p, of_prompt in enumerate(answers)}
    schedule = Schedule(
        lengths,
        seeds,
        devices=devices,
        slots=slots,
        max_new_tokens=max_new_tokens,
        prefill_tokens=prefill_tokens,
    )
    place = [[None] * slots for _ in range(devices)]  # work and tokens so far
    prefilled, done = [], []
    while True:
        for batch, moves in schedule.begin():
            if batch not in prefilled:
                prefilled.append(batch)
            for device, on_device in enumerate(moves):
                for move in on_device:
                    assert place[device][move.slot] is None, "a slot in use was given away"
                    assert batch.prompts[device][move.row] == move.work.prompt
                    place[device][move.slot] = [move.work, 0]
        if not schedule.is_running:
            break
        rows = schedule.shrink()
        if rows is not None:
            place = [[place[d][slot] for slot in kept] for d, kept in enumerate(rows)]
        steps = schedule.steps()
        assert steps >= 1
        for entry in (entry for on_device in place for entry in on_device if entry):
            entry[1] = min(entry[1] + steps, answers[entry[0].prompt][entry[0].seed])
        assert schedule.slots == len(place[0])
        new = [[entry[1] if entry else 0 for entry in on_device] for on_device in place]
        active = [
            [bool(e) and e[1] < answers[e[0].prompt][e[0].seed] for e in on_device] for on_device in place
        ]
        for device, slot, work in schedule.advance(steps, new, active):
            assert place[device][slot][0] == work
            place[device][slot] = None
            done.append((work.prompt, work.seed))
    return schedule, prefilled, done


def dolly_like(prompts, seeds=5, mean=80, most=128, seed=0):
    """Prompt lengths with a long tail, and answers that end at each token with the same chance."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(60), 0.6, prompts), 20, 800).astype(int).tolist()
    answers = np.minimum(rng.geometric(1 / mean, (prompts, seeds)), most).tolist()
    return lengths, answers


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("slots", [1, 7, 64])
def test_every_answer_is_made_once_and_every_prompt_prefilled_once(devices, slots):
    lengths, answers = dolly_like(60)
    _, prefilled, done = simulate(lengths, answers, devices=devices, slots=slots)
    assert sorted(done) == [(p, s) for p in range(60) for s in range(5)]
    assert sorted(p for batch in prefilled for on_device in batch.prompts for p in on_device) == list(
        range(60)
    )
    for batch in prefilled:
        assert all(len(on_device) <= batch.rows for on_device in batch.prompts)
        assert all(lengths[p] <= batch.length for on_device in batch.prompts for p in on_device)


@pytest.mark.parametrize(("mean", "most"), [(80, 128), (80, 512), (30, 256)])
def test_slots_are_used_at_least_85_percent(mean, most):
    lengths, answers = dolly_like(500, mean=mean, most=most)
    schedule, _, _ = simulate(lengths, answers, max_new_tokens=most)
    assert schedule.used_slot_steps == np.sum(answers)
    assert schedule.utilisation >= 0.85
    schedule, _, _ = simulate(lengths, answers, devices=4, slots=32, max_new_tokens=most)
    assert schedule.used_slot_steps == np.sum(answers)
    assert schedule.utilisation >= 0.85


def test_answers_of_one_length_leave_no_slot_idle():
    lengths, answers = [50] * 64, [[128]] * 64
    schedule, _, _ = simulate(lengths, answers)
    assert schedule.utilisation == 1.0


def test_few_slots_are_left_at_the_end():
    lengths, answers = [30] * 64, [[500]] + [[10]] * 63
    shrinking, _, _ = simulate(lengths, answers, max_new_tokens=500)
    # 64 slots all the way would be 64 * 500 slot-steps.
    assert shrinking.slots == 8
    assert shrinking.slot_steps < 64 * 150


def test_prefill_batches_are_full_and_similar_in_length():
    lengths, answers = dolly_like(500)
    _, prefilled, _ = simulate(lengths, answers)
    padded = sum(batch.rows * batch.length for batch in prefilled)
    assert padded < 1.5 * sum(lengths)
    assert len({(batch.rows, batch.length) for batch in prefilled}) <= 12
    assert all(batch.rows * batch.length <= 2048 for batch in prefilled)


def test_long_prompts_do_not_pad_short_ones():
    lengths = [34] * 20 + [46] * 19 + [49, 50, 54, 69, 130, 156, 173, 174, 209]
    _, prefilled, _ = simulate(lengths, [[3]] * len(lengths))
    assert [(batch.rows, batch.length) for batch in prefilled] == [(42, 48), (8, 192), (1, 256)]


@pytest.mark.parametrize(("per_octave", "smallest"), [(1, 16), (2, 16), (4, 64)])
def test_bucket_is_the_next_of_few_sizes(per_octave, smallest):
    sizes = sorted({bucket(length, per_octave, smallest) for length in range(1, 1025)})
    assert sizes[0] == smallest and sizes[-1] == 1024
    assert len(sizes) == per_octave * int(np.log2(1024 // smallest)) + 1
    for length in range(1, 1025):
        assert bucket(length, per_octave, smallest) == next(size for size in sizes if size >= length)


def test_no_slots():
    with pytest.raises(InputError, match="slots: -1"):
        simulate([5], [[3]], slots=-1)
