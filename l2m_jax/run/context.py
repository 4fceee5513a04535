"""What all phases of a run share, and how a run starts."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from l2m_jax import files, models
from l2m_jax.config import Config, Model
from l2m_jax.data.packing import Shape, choose_shapes
from l2m_jax.errors import InputError
from l2m_jax.generation import SamplingRules
from l2m_jax.models import DecoderConfig
from l2m_jax.multihost import first, is_first
from l2m_jax.parallel import Parallel
from l2m_jax.progress import console
from l2m_jax.run import build
from l2m_jax.training.metrics import MetricsLog
from l2m_jax.types import Params

_SECONDS = "phases.json"


class FinishedModel(NamedTuple):
    """A model as a finished artefact."""

    folder: Path
    fingerprint: str
    config: DecoderConfig
    params: Params


@dataclasses.dataclass
class Run:
    """What all phases share."""

    config: Config
    workdir: Path
    shared: Path
    parallel: Parallel
    tokenizer: Any
    splits: build.Splits
    shapes: tuple[Shape, ...]
    metrics: MetricsLog
    seconds: dict[str, float]  # that each phase has taken, over all starts

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        console.rule(name, align="left")
        start = time.monotonic()
        try:
            yield
        finally:  # an interrupted phase has taken its time too
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
            if is_first():
                files.write_json(self.workdir / _SECONDS, self.seconds)

    @property
    def rules(self) -> SamplingRules:
        s = self.config.sampling
        return SamplingRules(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            no_repeat_ngram=s.no_repeat_ngram,
            max_new_tokens=s.max_new_tokens,
        )

    def longest_prompt(self, config: DecoderConfig) -> int:
        """The most tokens of a prompt that leaves the model room for an answer."""
        room = config.max_positions - self.config.sampling.max_new_tokens
        return min(room, self.config.data.max_prompt_length or room)

    @property
    def placement(self) -> dict[str, Any]:
        """How generation is spread over devices: the same way as the step."""
        slots = self.config.sampling.slots or None
        if self.parallel.mapping == "fsdp":
            return {"mesh": self.parallel.mesh, "slots": slots}
        return {"devices": self.parallel.devices, "slots": slots}

    def load(self, folder: str | Path, settings: Model) -> tuple[DecoderConfig, Params]:
        """The model of a folder, computed as `settings` say, its parameters where generation needs them.

        That is sharded, or one copy. Compute type and remat stand in no folder.
        """
        sharded = self.parallel.mapping == "fsdp"
        config, params = models.load(folder, sharding=self.parallel.parameter_sharding if sharded else None)
        config = dataclasses.replace(
            config,
            dtype=build.compute_dtype(settings),
            remat=settings.remat,
            valid_vocab_size=min(config.valid_vocab_size, len(self.tokenizer)),
        )
        return config, params

    def finished_model(
        self,
        folder: Path,
        made_from: str,
        settings: Model,
        make: Callable[[], tuple[DecoderConfig, Params]],
        card: models.ModelCard | None = None,
    ) -> FinishedModel:
        """The model of `folder`; made and saved there first unless it is there already."""
        if first(lambda: files.is_finished(folder, made_from)):
            console.print(f"  already there: {folder}")
        else:
            config, params = make()

            def save() -> None:
                with files.writing(folder, made_from) as unfinished:
                    models.save(unfinished, config, params, tokenizer=self.tokenizer, card=card)

            first(save)
        return FinishedModel(folder, made_from, *self.load(folder, settings))


def start(config: Config, workdir: Path, shared: Path) -> Run:
    shared.mkdir(parents=True, exist_ok=True)
    first(lambda: files.write_json(workdir / "config.json", config))
    _use_compilation_cache()
    parallel = parallel_of(config)
    console.rule("data", align="left")
    tokenizer = build.build_tokenizer(config, shared / "data" / "tokenizer")
    build.check_tokenizers(config, tokenizer)
    splits = build.build_splits(config.data, tokenizer, shared / "data")
    shapes = choose_shapes(
        splits.train.lengths,
        batch_size=config.training.batch_size,
        num_devices=parallel.num_devices,
        max_shapes=config.max_shapes,
    )
    console.print(
        f"  packed into micro-batches of {', '.join(f'{s.rows} × {s.length}' for s in shapes)} tokens"
    )
    tensorboard = workdir / "tensorboard" if config.tensorboard else None
    metrics = MetricsLog(workdir / "metrics.jsonl", tensorboard)
    times = workdir / _SECONDS
    seconds = first(lambda: json.loads(times.read_text()) if times.is_file() else {})
    return Run(config, workdir, shared, parallel, tokenizer, splits, shapes, metrics, seconds)


def _use_compilation_cache() -> None:
    """A restart compiles nothing again. The user's own setting, if any, stands."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "l2m_jax" / "xla"))


def parallel_of(config: Config) -> Parallel:
    hosts = [jax.local_devices(process_index=process) for process in range(jax.process_count())]
    found = sum(map(len, hosts))
    count = config.devices.count or found
    if count > found:
        raise InputError(
            f"config.devices.count: {count} devices asked for, {found} found ({hosts[0][0].platform})"
        )
    share, rest = divmod(count, len(hosts))
    if rest or any(len(devices) < share for devices in hosts):
        raise InputError(
            f"config.devices.count: {count} devices cannot be shared out evenly over {len(hosts)} processes, which "
            f"have {', '.join(str(len(devices)) for devices in hosts)}; set it to a multiple of {len(hosts)} that "
            "each has its share of"
        )
    return Parallel(config.devices.mapping, tuple(device for devices in hosts for device in devices[:share]))
