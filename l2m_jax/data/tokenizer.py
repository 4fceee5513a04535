"""Tokenizers: loaded from a folder or the hub, or trained on the texts at hand."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2m_jax.data.online import require_hub
from l2m_jax.data.prompts import TEMPLATE_PHRASES
from l2m_jax.errors import InputError
from l2m_jax.files import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_FOLDER = "a folder with tokenizer.json, or with vocab.json and merges.txt"
_SMALLEST_VOCABULARY = 256 + 1
_PROBE = "\n\n### Response:\n It's 1,024 tokens;\tnaïve — 東京  <|endoftext|></s>"


def load_tokenizer(folder_or_name: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face folder, of a bare `vocab.json` with `merges.txt`, or of a hub name.

    Raises:
        InputError: nothing there can be loaded as a tokenizer, or it has no end-of-sequence token.
    """
    # Read at import: transformers otherwise prints that PyTorch is missing, which is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoTokenizer

    name, folder = str(folder_or_name), Path(folder_or_name)
    local = folder.is_dir()
    if local:
        files = {file.name for file in folder.iterdir()}
        if files.isdisjoint({"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}):
            if not files.issuperset({"vocab.json", "merges.txt"}):
                raise InputError(f"'{folder}' holds no tokenizer: pass {_FOLDER}")
            return _from_vocabulary(folder)
    elif folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise InputError(f"no such folder '{folder}': pass {_FOLDER}, or a hub name")
    try:
        # Files that are here already are used without asking the network about newer ones.
        local = local or isinstance(try_to_load_from_cache(name, "tokenizer_config.json"), str)
        if not local:
            require_hub(name, _FOLDER)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except InputError:
        raise
    except Exception as error:  # the loaders raise whatever their parsers do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load a tokenizer from '{name}' ({reason}): pass {_FOLDER}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of '{folder_or_name}' names no eos_token in its tokenizer_config.json"
        )
    return tokenizer


def _from_vocabulary(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import GPT2Tokenizer

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    files: dict[str, Any] = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    # OPT's vocabulary begins with <s> <pad> </s> <unk>, and its models were trained with </s> in front.
    if "</s>" in vocabulary:
        return GPT2Tokenizer(**files, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")
    if END_OF_TEXT in vocabulary:
        return GPT2Tokenizer(**files)
    raise InputError(f"{folder / 'vocab.json'} has no end-of-sequence entry ('{END_OF_TEXT}' or '</s>')")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, phrases: Sequence[str] = TEMPLATE_PHRASES
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE with GPT-2's pre-tokenisation, the same for the same texts.

    Args:
        texts: what to learn the merges from.
        vocab_size: entries in all, `<|endoftext|>` (id 0, end of sequence) and the phrases among them.
        phrases: texts kept whole as one token each.

    Raises:
        InputError: `vocab_size` does not hold the 256 bytes, the end of sequence and the phrases.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = _SMALLEST_VOCABULARY + len(phrases)
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size = {vocab_size} is too small for a byte-level tokenizer (at least {smallest})"
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
    # After training, which numbers its entries from 0 whatever has been added before.
    bpe.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Equal for tokenizers that give the same ids: the vocabulary, the special tokens, and a sample of text.

    Settings that leave the ids alone (padding side, maximal length, chat template) do not count.
    """
    return fingerprint(
        sorted(tokenizer.get_vocab().items()),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.encode(_PROBE, add_special_tokens=False),
    )
