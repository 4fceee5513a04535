"""Room on the disk: what a run has yet to write, checked before its first phase and told if the disk fills up later.

Nothing here communicates, because a disk may be full for one process alone.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from l2m_jax import files
from l2m_jax.config import Config
from l2m_jax.errors import InputError
from l2m_jax.models import DecoderConfig
from l2m_jax.models.freezing import Part
from l2m_jax.run import data
from l2m_jax.run.checks import architectures
from l2m_jax.run.models import ModelInputs
from l2m_jax.run.resolve import Artefacts
from l2m_jax.training.optimizer import OptimizerSettings, make_optimizer
from l2m_jax.training.shards import bytes_per_target
from l2m_jax.training.step import state_shapes
from l2m_jax.training.store_format import store_format

CHECKPOINTS = ", checkpoints"  # follows the name of a model
# A checkpoint is written before an older one is deleted: the latest, the best, and the next.
CHECKPOINTS_AT_ONCE = 3


def check_room(config: Config, artefacts: Artefacts) -> None:
    """Creates the run's folders.

    Raises:
        InputError: they have less room than the run needs.
    """
    folders = _folders(config, artefacts)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    require_room(bytes_needed(config, artefacts), _bytes_there(artefacts), *folders)


def require_room(sizes: Mapping[str, int], there: int, shared: Path, workdir: Path) -> None:
    """Compares with the room on both file systems, if they are not one.

    Args:
        sizes: as of `bytes_needed`.
        there: bytes of these that are on the disk already.
    """
    free = sum(
        {folder.stat().st_dev: shutil.disk_usage(folder).free for folder in (shared, workdir)}.values()
    )
    needed = peak_bytes(sizes) - there
    if needed > free:
        raise InputError(
            f"{shared}: the run needs about {_size(needed)} ({_listed(sizes)}), and {_size(free)} are free; make room, "
            "choose another --workdir, or set teacher.signal to 'live'"
        )


@contextlib.contextmanager
def full_disk_explained(config: Config, artefacts: Artefacts) -> Iterator[None]:
    """Says what the run has yet to write if the disk fills up within the block, in any library.

    Raises:
        InputError: the disk or the quota is full; the run can be resumed.
    """
    try:
        yield
    except Exception as error:
        if not files.disk_is_full(error):
            raise
        raise InputError(_full_disk(config, artefacts)) from error


def _full_disk(config: Config, artefacts: Artefacts) -> str:
    free = ", ".join(
        f"{folder} has {_size(shutil.disk_usage(folder).free)} free"
        for folder in dict.fromkeys(_folders(config, artefacts))
        if folder.is_dir()
    )
    try:
        sizes = bytes_needed(config, artefacts)
        needed = f"about {_size(max(0, peak_bytes(sizes) - _bytes_there(artefacts)))}"
        listed = _listed(sizes) or "answers and reports"
    except InputError:
        needed, listed = "the tokenised rows", "and what is made from them"
    return (
        f"the disk or the quota is full: {free}, and the run has yet to write {needed} ({listed}); make room and run "
        "the same command again, which resumes"
    )


def bytes_needed(config: Config, artefacts: Artefacts) -> dict[str, int]:
    """Bytes that the run has yet to write, by artefact. Answers and reports are negligible."""
    teacher, student = architectures(config, artefacts)
    trained = [
        *(
            (
                f"pretrained {role}",
                model,
                artefacts.pretrained[role],
                artefacts.pretrained[role].inputs.pretrain,
            )
            for role, model in (("teacher", teacher), ("student", student))
            if role in artefacts.pretrained
        ),
        ("teacher", teacher, artefacts.teacher, config.teacher.finetune),
        ("initial student", student, artefacts.initial_student, config.student.warmup),
        *((name, student, artefact, config.training) for name, artefact in artefacts.students.items()),
    ]
    sizes = {}
    for name, model, artefact, training in trained:
        if not artefact.is_finished_here:
            part = config.student_part if name in artefacts.students else training.part
            inputs = artefact.inputs
            trains = not isinstance(inputs, ModelInputs) or inputs.finetune is not None
            sizes |= model_bytes(name, model, training, part, trains)
    if artefacts.store is not None and not artefacts.store.is_finished_here:
        targets = int(data.open_corpus(artefacts.corpora["train"]).response_lengths.sum())
        found = artefacts.store.inputs
        sizes["teacher store"] = targets * store_bytes_per_target(teacher, found.dtype, found.top_k)
    return sizes


def model_bytes(
    name: str, model: DecoderConfig, training: OptimizerSettings, part: Part | None, trains: bool
) -> dict[str, int]:
    """Bytes of a model's float32 weights, and of the checkpoints of a training of `part` of it, if it `trains`."""
    optimizer = make_optimizer(training)
    state = state_shapes(optimizer, model, averaged=training.ema > 0, part=part)
    sizes = {name: _bytes(state_shapes(optimizer, model).params)}
    return sizes | ({f"{name}{CHECKPOINTS}": CHECKPOINTS_AT_ONCE * _bytes(state)} if trains else {})


def store_bytes_per_target(teacher: DecoderConfig, dtype: str, top_k: int) -> int:
    """Bytes of what a store of these settings keeps of a target."""
    return bytes_per_target(store_format(teacher.embed_size, dtype, top_k).tensors)


def peak_bytes(sizes: Mapping[str, int]) -> int:
    """The most bytes on disk at a time, given those of `bytes_needed`: checkpoints go with their finished model."""
    checkpoints = [size for name, size in sizes.items() if name.endswith(CHECKPOINTS)]
    return sum(sizes.values()) - sum(checkpoints) + max(checkpoints, default=0)


def _folders(config: Config, artefacts: Artefacts) -> tuple[Path, Path]:
    """The shared folder and the workdir."""
    return artefacts.teacher.path.parent, artefacts.evaluations[config.method].path.parents[1]


def _bytes_there(artefacts: Artefacts) -> int:
    """What unfinished work takes already: checkpoints, and shards of the teacher store."""
    places = [artefact.progress for artefact in artefacts if artefact.progress is not None]
    if artefacts.store is not None and not artefacts.store.is_finished_here:
        places.append(artefacts.store.path)
    return sum(file.stat().st_blocks * 512 for place in places for file in place.rglob("*") if file.is_file())


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
