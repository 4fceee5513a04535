"""Tokenizers: loaded from a folder or the hub, or trained on given texts."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2m_jax.data.online import require_hub
from l2m_jax.data.prompts import TEMPLATE_PHRASES
from l2m_jax.errors import InputError, reason, require_type
from l2m_jax.files import fingerprint, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_FOLDER = "a folder with tokenizer.json, or with vocab.json and merges.txt"
# The 256 bytes, the end of sequence, and the phrases of the prompts.
MIN_VOCAB_SIZE = 256 + 1 + len(TEMPLATE_PHRASES)
_PROBE = "\n\n### Response:\n It's 1,024 tokens;\tnaïve — 東京  <|endoftext|></s>"


def load_tokenizer(folder_or_name: str | Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a Hugging Face folder, of a bare `vocab.json` with `merges.txt`, or of a hub name.

    Raises:
        InputError: there is no tokenizer, it cannot be loaded, or it has no end-of-sequence token.
    """
    # Set before the import: transformers would print a warning that PyTorch is missing, which is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoTokenizer

    name, folder = str(folder_or_name), Path(folder_or_name)
    local = folder.is_dir()
    if local:
        files = {file.name for file in folder.iterdir()}
        if files.isdisjoint({"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}):
            if not files.issuperset({"vocab.json", "merges.txt"}):
                raise InputError(f"'{folder}' contains no tokenizer: pass {_FOLDER}")
            return _from_vocabulary(folder)
        for file in files & {"config.json", "tokenizer.json", "tokenizer_config.json"}:
            require_type(str(folder / file), read_json(folder / file), dict)
    elif folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise InputError(f"no such folder '{folder}': pass {_FOLDER}, or a hub name")
    try:
        # Cached files are used without asking the network for newer ones.
        local = local or isinstance(try_to_load_from_cache(name, "tokenizer_config.json"), str)
        if not local:
            require_hub(name, _FOLDER)
        # False and not None: transformers would ask on the terminal whether to run a folder's own code.
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # loaders raise errors of many kinds
        raise InputError(
            f"cannot load a tokenizer from '{name}' ({reason(error)}): pass {_FOLDER}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of '{folder_or_name}' has no eos_token in its tokenizer_config.json")
    return tokenizer


def _from_vocabulary(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import GPT2Tokenizer

    vocabulary = read_json(folder / "vocab.json")
    require_type(str(folder / "vocab.json"), vocabulary, dict)
    files: dict[str, Any] = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    try:
        # OPT's vocabulary begins with <s> <pad> </s> <unk>, but its models were trained with </s> as the first token.
        if "</s>" in vocabulary:
            return GPT2Tokenizer(
                **files, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
            )
        if END_OF_TEXT in vocabulary:
            return GPT2Tokenizer(**files)
    except Exception as error:  # loaders raise errors of many kinds
        raise InputError(
            f"cannot load vocab.json and merges.txt of '{folder}' ({reason(error)}): pass {_FOLDER}"
        ) from error
    raise InputError(f"{folder / 'vocab.json'} has no end-of-sequence entry ('{END_OF_TEXT}' or '</s>')")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, phrases: Sequence[str] = TEMPLATE_PHRASES
) -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE tokenizer with GPT-2's pre-tokenisation. Deterministic.

    Args:
        texts: texts from which the merges are learnt.
        vocab_size: total number of entries, including `<|endoftext|>` (id 0, end of sequence) and the phrases.
        phrases: texts that become a single token each.

    Raises:
        InputError: `vocab_size` is too small for the 256 bytes, the end of sequence and the phrases.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = MIN_VOCAB_SIZE - len(TEMPLATE_PHRASES) + len(phrases)
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size: {vocab_size} is too small for a byte-level tokenizer; it must be {smallest} or more"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(phrases),
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # Added after training, which numbers its entries from 0 and overwrites earlier ones.
    bpe.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash that is equal for tokenizers that produce the same ids.

    It covers the vocabulary, the merges, the special tokens and the ids of a sample text. Settings that do not affect ids (padding
    side, maximum length, chat template) do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    return fingerprint(
        sorted(tokenizer.get_vocab().items()),
        merges,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.encode(_PROBE, add_special_tokens=False),
    )
