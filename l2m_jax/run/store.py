"""The phase that computes the teacher's hidden states at the reference responses, once for all students."""

from dataclasses import dataclass, field

from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import data
from l2m_jax.run.artefacts import Artefact
from l2m_jax.run.context import Context
from l2m_jax.run.models import load_frozen, read_config
from l2m_jax.training.step import hidden_pass
from l2m_jax.training.store import TeacherStore


@dataclass(frozen=True)
class StoreInputs:
    """
    Attributes:
        dtype: "float32", "bfloat16" or "float16".
        weights: "float" or "int8", of the teacher.
    """

    teacher: Artefact
    train: Artefact
    tokenizer: data.Tokenizer
    dtype: str
    weights: str = field(default="float", metadata={"absent_at_default": True})


def open_store(artefact: Artefact[StoreInputs], context: Context) -> TeacherStore:
    """The store, complete or not. Nothing is placed on the devices."""
    inputs = artefact.inputs
    config = read_config(inputs.teacher, context.teacher, inputs.tokenizer)
    train = data.open_corpus(inputs.train)
    return TeacherStore(artefact.path, train, key=artefact.key, width=config.embed_size, dtype=inputs.dtype)


def make_store(artefact: Artefact[StoreInputs], context: Context) -> TeacherStore:
    """The complete store. What is missing is computed."""
    store = open_store(artefact, context)
    if store.is_complete and artefact.is_finished:
        console.print(f"  already there: {artefact.path}")
        return store
    artefact.begin()
    inputs, placement = artefact.inputs, context.placement
    config, params = load_frozen(inputs.teacher, context.teacher, inputs.tokenizer, placement, inputs.weights)
    forward = placement.map(hidden_pass)
    store.fill(placement, lambda batch: forward(config, params, batch))
    first(artefact.finish)
    return store
