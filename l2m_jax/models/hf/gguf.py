"""Llama, Qwen2 and Qwen3 models in llama.cpp's GGUF format, read with the `gguf` package (extra "gguf")."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from l2m_jax.errors import InputError, reason, shown
from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.hf import gguf_header
from l2m_jax.models.hf.families import FAMILIES

# llama.cpp's names -> Hugging Face's.
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_HEAD = "output.weight"
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Mistral's files say "llama" too. Other architectures differ in more than names: Gemma's norms are stored plus 1.
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_BYTE_LEVEL = ("gpt-2", "default", "smollm")


class GgufFile:
    """The tensors of a GGUF file by their Hugging Face names, dequantised when read.

    Raises:
        InputError: the `gguf` package is missing, the file is cut off, or its architecture is not supported.
    """

    def __init__(self, file: Path):
        try:
            import gguf
        except ModuleNotFoundError as error:
            raise InputError(f"reading {file} needs the gguf package: pip install 'l2m_jax[gguf]'") from error
        self.file = file
        try:
            gguf_header.check(file, functools.partial(_tensor_bytes, gguf))
            reader = gguf.GGUFReader(file)
        except Exception as error:  # the reader raises errors of many kinds
            raise InputError(
                f"{file} is cut off or not a GGUF file ({reason(error)}); fetch it again"
            ) from error
        self._dequantize = gguf.quants.dequantize
        self._metadata = reader.fields
        self._architecture = self._get("general.architecture")
        if self._architecture not in _ARCHITECTURES:
            raise InputError(
                f"{file} holds a {shown(self._architecture)} model; only {', '.join(_ARCHITECTURES)} are supported in "
                "GGUF files"
            )
        self._tensors = {self._name(tensor.name): tensor for tensor in reader.tensors}
        # GGUF lists the fastest axis first.
        self.shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in self._tensors.items()}

    def _get(self, key: str, default: Any = None) -> Any:
        field = self._metadata.get(key)
        try:
            return default if field is None else field.contents()
        except (ValueError, IndexError) as error:
            raise InputError(
                f"{self.file}: cannot read {key} ({reason(error)}); convert the model again"
            ) from error

    def _name(self, stored: str) -> str:
        if stored in _TOP:
            return _TOP[stored]
        if stored == _HEAD:
            return "lm_head.weight"
        parts = stored.split(".")
        if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK:
            return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
        return stored

    def config(self) -> DecoderConfig:
        """The architecture in the file's metadata."""

        kind = self._architecture

        def need(key: str) -> Any:
            value = self._get(f"{kind}.{key}")
            if value is None:
                raise InputError(f"{self.file} lacks {kind}.{key} in its metadata; convert the model again")
            return value

        if self._get(f"{kind}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in self.shapes:
            raise InputError(
                f"{self.file} scales its rotary positions, which is not supported in GGUF files; load the safetensors folder instead"
            )
        if "model.embed_tokens.weight" not in self.shapes:
            raise InputError(f"{self.file} lacks token_embd.weight; convert the model again")
        layer = "model.layers.0"
        described = {
            "model_type": kind,
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": need("embedding_length"),
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": need("attention.head_count"),
            "num_key_value_heads": self._get(f"{kind}.attention.head_count_kv"),
            "head_dim": self._get(f"{kind}.attention.key_length"),
            "intermediate_size": need("feed_forward_length"),
            "max_position_embeddings": need("context_length"),
            "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._get(f"{kind}.rope.freq_base", 10_000.0),
            "attention_bias": f"{layer}.self_attn.q_proj.bias" in self.shapes,
            "mlp_bias": f"{layer}.mlp.up_proj.bias" in self.shapes,
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id"),
        }
        try:
            return FAMILIES[kind].read_config(described)
        except InputError as error:
            raise InputError(f"{self.file}: {str(error).removeprefix('config.json: ')}") from error

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = self._tensors[name]
        rows = np.arange(self.shapes[name][0])
        # Only "llama" rotates neighbouring pairs.
        if self._architecture == "llama" and ".q_proj." in name:
            rows = _halves(rows, int(self._get("llama.attention.head_count")))
        elif self._architecture == "llama" and ".k_proj." in name:
            heads = self._get("llama.attention.head_count_kv", self._get("llama.attention.head_count"))
            rows = _halves(rows, int(heads))
        return self._dequantize(tensor.data[rows[index[0]]], tensor.tensor_type)[:, *index[1:]]

    def place(self, name: str) -> str:
        return str(self.file)

    def tokenizer(self) -> Any:
        """The tokenizer in the file's metadata, as a `transformers` tokenizer with chat template.

        Raises:
            InputError: it is not a byte-level BPE that the metadata describes completely.
        """
        try:
            return self._tokenizer()
        except InputError:
            raise
        except Exception as error:  # missing or wrong entries
            raise InputError(
                f"{self.file}: cannot build a tokenizer from its metadata ({type(error).__name__}: {reason(error)}); "
                "name the model's tokenizer folder instead"
            ) from error

    def _tokenizer(self) -> Any:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        kind, splitting = self._get("tokenizer.ggml.model"), self._get("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or splitting not in _BYTE_LEVEL:
            raise InputError(
                f"{self.file} has a {shown(kind)} tokenizer with {shown(splitting)} splitting, which cannot be built from "
                "the file; name the model's tokenizer folder instead"
            )
        tokens = self._get("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._get("tokenizer.ggml.merges")]
        bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        # SmolLM splits numbers into single digits before merging.
        digits = [pre_tokenizers.Digits(individual_digits=True)] if splitting == "smollm" else []
        bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])  # type: ignore[assignment]
        bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        control = 3
        types = self._get("tokenizer.ggml.token_type", [])
        special = [token for token, token_type in zip(tokens, types, strict=False) if token_type == control]
        bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])

        ids = {
            "bos_token": self._get("tokenizer.ggml.bos_token_id"),
            "eos_token": self._get("tokenizer.ggml.eos_token_id"),
            "unk_token": self._get("tokenizer.ggml.unknown_token_id"),
            "pad_token": self._get("tokenizer.ggml.padding_token_id"),
        }
        named = {name: tokens[i] for name, i in ids.items() if i is not None}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
        tokenizer.chat_template = self._get("tokenizer.chat_template")
        return tokenizer


def _tensor_bytes(gguf: Any, kind: int, elements: int) -> int:
    kinds = gguf.GGMLQuantizationType
    readable = {kinds.F32, kinds.F16, *gguf.quants._type_traits}
    if kind not in {int(known) for known in readable}:
        raise ValueError(f"tensors of type {kind} are not supported")
    block, size = gguf.GGML_QUANT_SIZES[kinds(kind)]
    return elements * size // block


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Where the rows of q and k are in llama.cpp's order, which rotates pairs (2d, 2d+1) instead of (d, d + D/2)."""
    return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
