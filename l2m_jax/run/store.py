"""The phase that computes the teacher's signal at the reference responses, or imports it, once for all students."""

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from l2m_jax import files, models
from l2m_jax.errors import InputError
from l2m_jax.models import DecoderConfig
from l2m_jax.multihost import first
from l2m_jax.progress import console
from l2m_jax.run import data, tokenizers
from l2m_jax.run.artefacts import Artefact, Source
from l2m_jax.run.context import Context
from l2m_jax.run.models import load_frozen, read_config
from l2m_jax.training.imported import Imported, ImportedTeacher
from l2m_jax.training.outputs import Outputs
from l2m_jax.training.step import hidden_pass, top_k_pass
from l2m_jax.training.store import TeacherStore
from l2m_jax.training.store_format import store_format

_IMPORTED = "imported.json"
_COMPARED = 256  # targets at which an imported signal is compared with the reference


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
    tokenizer: tokenizers.Tokenizer
    dtype: str
    weights: str = field(default="float", metadata={"absent_at_default": True})
    top_k: int = field(default=0, metadata={"absent_at_default": True})


def open_store(artefact: Artefact[StoreInputs], context: Context, *, tail: bool = True) -> TeacherStore:
    """The store, complete or not. Nothing is placed on the devices.

    Args:
        tail: with top-k log-probabilities, whether micro-batches have the tail.
    """
    inputs = artefact.inputs
    return _open(artefact, read_config(inputs.teacher, context.teacher, inputs.tokenizer), tail)


def _open(artefact: Artefact[StoreInputs], teacher: DecoderConfig, tail: bool = True) -> TeacherStore:
    inputs = artefact.inputs
    form = store_format(teacher.embed_size, inputs.dtype, inputs.top_k, tail)
    return TeacherStore(artefact.path, data.open_corpus(inputs.train), key=artefact.key, form=form)


def make_store(artefact: Artefact[StoreInputs], context: Context) -> TeacherStore:
    """The complete store. What is missing is computed.

    Raises:
        InputError: a part of it was imported.
    """
    store = open_store(artefact, context)
    if store.is_complete and artefact.is_finished:
        console.print(f"  already there: {artefact.path}")
        return store
    if first((artefact.path / _IMPORTED).is_file):
        raise InputError(
            f"{artefact.path}: was imported, and is not complete; run the same `l2m store import` again, or delete the folder "
            "to compute all of it"
        )
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


def import_store(artefact: Artefact[StoreInputs], outputs: Outputs, context: Context) -> None:
    """Fills the store from what another tool has written of the teacher. Of the teacher, no layer is loaded.

    Raises:
        InputError: the teacher is one that this run still has to train; outputs that are not of this teacher, of these
            rows, or of the store's kind; or the vocabulary is trimmed, and `outputs` are log-probabilities.
    """
    inputs, model = artefact.inputs, _run_elsewhere(artefact.inputs)
    config = read_config(model, context.teacher, inputs.tokenizer)
    store = _open(artefact, config)
    if store.is_complete and artefact.is_finished:
        console.print(f"  already there: {artefact.path}")
        return
    kept = tokenizers.kept(model, inputs.tokenizer)
    if inputs.top_k and kept is not None:
        raise InputError(
            "config.data.trim_vocabulary: log-probabilities of the whole vocabulary are not those of a trimmed one, which "
            "share out the mass of the dropped tokens; import hidden states, or set it to 0"
        )
    path = str(model.path)
    teacher = ImportedTeacher(
        config=dataclasses.replace(config, dtype="float32"),
        vocab_size=models.read_config(path).vocab_size,
        output=models.load_output(path),
        kept=kept,
        top_k=inputs.top_k,
    )
    train = data.open_corpus(inputs.train)
    imported = Imported(outputs, train, teacher)
    artefact.begin()
    first(lambda: files.write_json(artefact.path / _IMPORTED, {"from": str(outputs.folder.absolute())}))
    store.fill_from(imported.read)
    share = first(lambda: _share_expected(store, train, path, teacher))
    console.print(f"  of the first targets, {share:.1%} are the token that the teacher expects most")
    first(lambda: artefact.finish(without=store.files))


def _share_expected(store: TeacherStore, train: data.Corpus, path: str, teacher: ImportedTeacher) -> float:
    """The share of the first targets that are the stored signal's most probable token.

    It is low if the signal is that of another position, layer or model.
    """
    hits = []
    head_VxE = None
    if not teacher.top_k:
        head_VxE = np.asarray(models.load_head(path, dtype="float32"))
        head_VxE = head_VxE if teacher.kept is None else head_VxE[teacher.kept]
    for i in range(len(train)):
        if store.offsets[i] >= _COMPARED:
            break
        stored = store.read(i)
        if head_VxE is None:
            expected = stored["teacher_ids_TxK"][:, 0]
        else:
            expected = (stored["teacher_hidden_TxE"].astype(np.float32) @ head_VxE.T).argmax(axis=1)
        hits.append(expected == train.example_tokens(i)[train.target_positions(i)])
    return float(np.concatenate(hits).mean())


def _run_elsewhere(inputs: StoreInputs) -> Artefact | Source:
    """The model whose outputs are imported: as it was given, or as this run has trained it."""
    teacher = inputs.teacher.inputs
    if teacher.weights is not None and teacher.model.init == "pretrained" and teacher.finetune is None:
        return teacher.weights
    if inputs.teacher.is_finished:
        return inputs.teacher
    raise InputError(
        "config.teacher: this run trains its teacher first, so no other tool can have run it; set teacher.finetune.epochs "
        "to 0 and teacher.model.path to the model that was run"
    )
