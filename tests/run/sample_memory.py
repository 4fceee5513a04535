"""A run on 4 fake devices whose live arrays are sampled: python sample_memory.py MAPPING FOLDER OUTPUT [KILL_AT_STEP].

Prints nothing; writes JSON: for each moment (start, training, checkpoint, validation, resume, best, elsewhere) the most
bytes of weights on each device. Weights are arrays with the shape of a parameter of teacher or student; the others
are activations: micro-batches, KV caches, logits.
"""

import collections
import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np

from l2m_jax import models
from l2m_jax.config import parse
from l2m_jax.run import pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs.tiny import get_config

# Functions of the package that the main thread is in, innermost first.
MOMENTS = {
    "restore_latest": "resume",
    "restore_best": "best",
    "_validate_now": "validation",
    "save": "checkpoint",
    "_train_batch": "training",
    "_train_stage": "training",
    "run": "start",
}
TEACHER_WIDTH, STUDENT_WIDTH = 192, 128


def config(mapping: str, folder: Path, **changes):
    values = get_config("no_dropout")
    for model, width in ((values.teacher.model, TEACHER_WIDTH), (values.student.model, STUDENT_WIDTH)):
        model.architecture.update(num_layers=3, num_heads=4, hidden_size=width)
    values.data.synthetic.update(train=32, tokenizer_size=512)
    values.devices.update(mapping=mapping, count=4, slots=1)
    values.evaluation.update(seeds=(10,), validations=3)
    values.sampling.max_new_tokens = 2
    values.curriculum.update(stages=2, epochs_per_stage=2)
    values.training.learning_rate = 3e-3
    values.update_from_flattened_dict(changes)
    return parse(values)


def weight_shapes(parsed) -> set[tuple[int, ...]]:
    """Shapes of all parameters, whole and by layer."""
    found = set()
    for folder in (parsed.teacher.model.path, parsed.student.model.path):
        described = models.read_config(folder)
        params = jax.eval_shape(lambda c=described: models.init(c, jax.random.key(0)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            found.add(leaf.shape)
            if str(path[0].key) == "blocks":
                found.add(leaf.shape[1:])
    return found


class Sampler:
    def __init__(self, shapes: set[tuple[int, ...]]):
        # A norm's scale has the shape of an embedding's row, say: only what is large tells them apart.
        self._shapes = {shape for shape in shapes if np.prod(shape) >= 1024}
        self.most: dict[str, list[int]] = collections.defaultdict(lambda: [0] * 4)
        self._main, self._stop = threading.main_thread().ident, False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop = True
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop:
            # An array may be deleted while it is looked at.
            with contextlib.suppress(RuntimeError, ValueError):
                self._sample()
            time.sleep(0.001)

    def _sample(self) -> None:
        moment = self._moment()
        held = [0] * 4
        for array in jax.live_arrays():
            if array.is_deleted() or not (array.shape in self._shapes or array.shape[1:] in self._shapes):
                continue
            share = int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize
            for device in array.sharding.addressable_devices:
                held[device.id] += share
        self.most[moment] = [max(pair) for pair in zip(self.most[moment], held, strict=True)]

    def _moment(self) -> str:
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            name, file = frame.f_code.co_name, frame.f_code.co_filename
            if f"l2m_jax{os.sep}training" in file and name in MOMENTS:
                return MOMENTS[name]
            frame = frame.f_back
        return "elsewhere"


def kill_at(step: int, metrics: Path) -> None:
    """Ends this process without a word once the student has made so many steps."""

    def watch():
        while not (metrics.is_file() and f'"phase": "student", "step": {step},' in metrics.read_text()):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(mapping: str, folder: str, output: str, kill: str = "") -> None:
    parsed = config(
        mapping,
        Path(folder),
        **{
            "teacher.model.path": f"{folder}/pretrained/teacher",
            "student.model.path": f"{folder}/pretrained/student",
        },
    )
    sampler = Sampler(weight_shapes(parsed))
    workdir = Path(folder) / mapping
    if kill:
        kill_at(int(kill), workdir / "metrics.jsonl")
    pipeline.run(parsed, workdir)
    sampler.stop()
    Path(output).write_text(json.dumps(sampler.most))


if __name__ == "__main__":
    main(*sys.argv[1:])
