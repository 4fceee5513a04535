"""Exposure, against examples counted one by one."""

import json
from collections import Counter

import numpy as np

from l2m_jax.curriculum import Exposure, baby_steps, exposure, partition, single_stage


def test_groups_are_counted_as_the_batches_show_them():
    stages = baby_steps(partition(np.random.default_rng(0).permutation(50), 4), epochs=2.5, mix=0.25, seed=1)
    group_N = np.arange(50) % 3
    group_N[7] = -1
    found = exposure(stages, 1, 8, "abc", group_N)
    update, ends = 0, iter(zip(found.end_K, found.stage_K, found.seen_KxG, strict=True))
    end, of_stage, seen = next(ends)
    counted, spans = Counter(), 0
    for stage in stages:
        for epoch in range(stage.epochs):
            order = stage.order(epoch, 1)
            for start in range(0, len(order), 8):
                counted.update(int(group_N[i]) for i in order[start : start + 8])
                update += 1
                if update == end:
                    assert (of_stage, seen.tolist()) == (stage.index, [counted[g] for g in range(3)])
                    counted, spans = Counter(), spans + 1
                    end, of_stage, seen = next(ends, (0, 0, seen))
    assert spans == len(found.end_K) and found.end_K[-1] == update
    assert found.sizes == (17, 16, 16)


def test_long_training_is_summed_in_spans_within_stages_and_survives_json():
    stages = baby_steps(partition(np.arange(4000), 4))
    found = exposure(stages, 0, 16, ["1", "2", "3", "4"], np.arange(4000) // 1000)
    assert len(found.end_K) < 130
    np.testing.assert_array_equal(found.passes(), [32, 24, 16, 8])
    np.testing.assert_array_equal(found.passes(2), [8, 8, 0, 0])
    again = Exposure.from_json(json.loads(json.dumps(found.to_json())))
    assert again.names == found.names and again.stages == [1, 2, 3, 4]
    np.testing.assert_array_equal(again.seen_KxG, found.seen_KxG)


def test_the_part_of_a_cut_epoch_counts():
    found = exposure(single_stage(np.arange(10), 25), 0, 4, ["all"], np.zeros(10, int))
    assert found.seen_KxG.sum() == 25 and found.end_K[-1] == 3 + 3 + 2
