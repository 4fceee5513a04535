"""A run on 4 fake devices whose live arrays are sampled: python sample_memory.py MAPPING FOLDER OUTPUT [KILL_AT_STEP].

Writes JSON: the most bytes of weights on each device, by phase and moment ("teacher: training", "student: resume").
Weights are arrays with the shape of a parameter of teacher or student; the others are activations: micro-batches, KV
caches, logits. With KILL_AT_STEP the process writes and ends without a word once the student has made so many steps.
"""

import collections
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import jax
import numpy as np

from l2m_jax import models
from l2m_jax.config import parse
from l2m_jax.data.synthetic import synthetic_rows
from l2m_jax.data.tokenizer import train_tokenizer
from l2m_jax.parallel import Placement
from l2m_jax.run import pipeline
from l2m_jax.training.checkpoint import Checkpoints
from l2m_jax.training.loop import Trainer
from l2m_jax.training.metrics import MetricsLog

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs.tiny import get_config

# By the functions that the main thread is in.
PHASES = {
    "make_student": "student",
    "make_store": "store",
    "make_states": "diagnostics",
    "make_ranking": "ranking",
    "make_evaluation": "evaluation",
}
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


def config(mapping: str, **changes):
    values = get_config("no_dropout")
    for model, width in ((values.teacher.model, TEACHER_WIDTH), (values.student.model, STUDENT_WIDTH)):
        model.architecture.update(num_layers=3, num_heads=4, hidden_size=width)
    values.data.synthetic.update(train=32, tokenizer_size=512)
    values.devices.update(mapping=mapping, count=4, slots=1)
    values.evaluation.update(seeds=(10,), validations=3, diagnostic_rows=32)
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

    def after(self, owner: type, name: str) -> None:
        """Samples whenever the main thread returns from a method of the package."""
        original = getattr(owner, name)

        def sampled(*arguments, **named):
            result = original(*arguments, **named)
            # Other threads feed batches in advance, while a step may delete the arrays of this one.
            if threading.current_thread() is threading.main_thread():
                self.sample(MOMENTS.get(name, ""))
            return result

        setattr(owner, name, sampled)

    def sample(self, moment: str = "") -> None:
        moment = self._moment(moment)
        buffers: dict[tuple[int, int], int] = {}  # bytes by device and address: arrays may share a buffer
        for array in jax.live_arrays():
            if array.is_deleted() or not (array.shape in self._shapes or array.shape[1:] in self._shapes):
                continue
            for shard in array.addressable_shards:
                buffers[shard.device.id, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
        held = [sum(size for (on, _), size in buffers.items() if on == device) for device in range(4)]
        self.most[moment] = [max(pair) for pair in zip(self.most[moment], held, strict=True)]

    def _moment(self, moment: str) -> str:
        frame = sys._getframe()
        while frame is not None:
            name, file = frame.f_code.co_name, frame.f_code.co_filename
            if not moment and f"l2m_jax{os.sep}training" in file:
                moment = MOMENTS.get(name, "")
            if f"l2m_jax{os.sep}run" in file and name == "make_model":
                return f"{frame.f_locals['name']}: {moment or 'saving'}"
            if f"l2m_jax{os.sep}run" in file and name in PHASES:
                return f"{PHASES[name]}: {moment}".removesuffix(": ")
            frame = frame.f_back
        return "elsewhere"


def kill_at(step: int, metrics: Path, write: Callable[[], None]) -> None:
    def watch():
        while not (metrics.is_file() and f'"phase": "student", "step": {step},' in metrics.read_text()):
            time.sleep(0.002)
        write()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def make_pretrained(folder: Path) -> None:
    """Folders of a teacher and a student with random weights and one tokenizer."""
    parsed = config("pmap")
    rows = synthetic_rows(0, 32, 1, 1).train
    texts = [f"{row.instruction} {row.input} {row.references[0]}" for row in rows]
    tokenizer = train_tokenizer(texts, parsed.data.synthetic.tokenizer_size)
    for name, settings in (("teacher", parsed.teacher), ("student", parsed.student)):
        found = models.random_config(settings.model.architecture, tokenizer)
        params = models.init(found, jax.random.key(0))
        models.save(folder / name, found, params, tokenizer=tokenizer)


def main(mapping: str, folder: str, output: str, kill: str = "") -> None:
    pretrained = Path(folder) / "pretrained"
    if not pretrained.exists():
        make_pretrained(pretrained)
    paths = {f"{who}.model.path": str(pretrained / who) for who in ("teacher", "student")}
    parsed = config(mapping, **paths)
    sampler, workdir = Sampler(weight_shapes(parsed)), Path(folder) / mapping
    for name in ("_restore", "_placed", "save"):
        sampler.after(Checkpoints, name)
    sampler.after(Trainer, "_train_batch")
    # The last call before training starts.
    sampler.after(MetricsLog, "drop_after")
    # All other phases feed their batches while their weights are on the devices.
    sampler.after(Placement, "feed")

    def write() -> None:
        Path(output).write_text(json.dumps(sampler.most))

    if kill:
        kill_at(int(kill), workdir / "metrics.jsonl", write)
    pipeline.run(parsed, workdir)
    write()


if __name__ == "__main__":
    main(*sys.argv[1:])
