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
from l2m_jax.training.store_format import HiddenStates


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
    form = HiddenStates(config.embed_size, inputs.dtype)
    return TeacherStore(artefact.path, train, key=artefact.key, form=form)


def make_store(artefact: Artefact[StoreInputs], context: Context) -> TeacherStore:
    """The complete store. What is missing is computed."""
    store = open_store(artefact, context)
    if store.is_complete and artefact.is_finished:
        console.print(f"  already there: {artefact.path}")
        return store
    artefact.begin()
    inputs, own = artefact.inputs, context.placement.own
    config, params = load_frozen(inputs.teacher, context.teacher, inputs.tokenizer, own, inputs.weights)
    forward = own.map(hidden_pass)
    store.fill(context.placement, lambda batch: forward(config, params, batch))
    first(lambda: artefact.finish(without=store.files))
    return store
