"""The phase that computes the teacher's signal at the reference responses, once for all students."""

from dataclasses import dataclass, field

from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import data
from l2m_jax.run.artefacts import Artefact
from l2m_jax.run.context import Context
from l2m_jax.run.models import load_frozen, read_config
from l2m_jax.training.step import hidden_pass, top_k_pass
from l2m_jax.training.store import TeacherStore
from l2m_jax.training.store_format import store_format


@dataclass(frozen=True)
class StoreInputs:
    """
    Attributes:
        dtype: "float32", "bfloat16", "float16" or "int8".
        weights: "float" or "int8", of the teacher.
        top_k: of so many tokens log-probabilities are stored; 0: hidden states.
    """

    teacher: Artefact
    train: Artefact
    tokenizer: data.Tokenizer
    dtype: str
    weights: str = field(default="float", metadata={"absent_at_default": True})
    top_k: int = field(default=0, metadata={"absent_at_default": True})


def open_store(artefact: Artefact[StoreInputs], context: Context, *, tail: bool = True) -> TeacherStore:
    """The store, complete or not. Nothing is placed on the devices.

    Args:
        tail: with top-k log-probabilities, whether micro-batches have the tail.
    """
    inputs = artefact.inputs
    config = read_config(inputs.teacher, context.teacher, inputs.tokenizer)
    train = data.open_corpus(inputs.train)
    form = store_format(config.embed_size, inputs.dtype, inputs.top_k, tail)
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
    if inputs.top_k:
        function, static = own.map(top_k_pass), (config, inputs.top_k, context.chunk_size)
    else:
        function, static = own.map(hidden_pass), (config,)
    store.fill(context.placement, lambda batch: function(*static, params, batch))
    first(lambda: artefact.finish(without=store.files))
    return store
