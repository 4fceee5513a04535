"""GPT-2 in Hugging Face's names."""

from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.hf import config_json
from l2m_jax.models.hf.config_json import Json, Key
from l2m_jax.models.hf.weights import Weight, norm

ARCHITECTURE = "GPT2LMHeadModel"
PREFIX = "transformer."
# Buffers in old files: the causal mask and the value of masked scores.
IGNORED = r"h\.\d+\.attn\.(bias|masked_bias)"

DROPOUT = ("embedding_dropout", "attention_dropout", "residual_dropout")
RANDOM = {"activation": "gelu_new", "scaled_residual_init": True, **dict.fromkeys(DROPOUT, 0.1)}

_KEYS = {
    "vocab_size": Key("vocab_size", 50257),
    "n_embd": Key("hidden_size", 768),
    "n_layer": Key("num_layers", 12),
    "n_head": Key("num_heads", 12),
    "n_inner": Key("intermediate_size", None),
    "n_positions": Key("max_positions", 1024),
    "activation_function": Key("activation", "gelu_new"),
    "layer_norm_epsilon": Key("norm_eps", 1e-5),
    "scale_attn_weights": Key("scale_attention", True),
    "embd_pdrop": Key("embedding_dropout", 0.1),
    "attn_pdrop": Key("attention_dropout", 0.1),
    "resid_pdrop": Key("residual_dropout", 0.1),
    "initializer_range": Key("init_std", 0.02),
    "tie_word_embeddings": Key("tie_embeddings", True),
    "bos_token_id": Key("bos_token_id", 50256),
    "eos_token_id": Key("eos_token_id", 50256),
    "pad_token_id": Key("pad_token_id", None),
}
_REQUIRED = {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def read_config(hf: Json) -> DecoderConfig:
    fields = config_json.read(hf, _KEYS, _REQUIRED)
    width, heads = fields["hidden_size"], fields["num_heads"]
    fields["intermediate_size"] = fields["intermediate_size"] or 4 * width
    return DecoderConfig(
        family="gpt2",
        valid_vocab_size=fields["vocab_size"],
        embed_size=width,
        num_kv_heads=heads,
        head_dim=config_json.head_dim(width, heads),
        scaled_residual_init=True,
        **fields,
    )


def write_config(config: DecoderConfig) -> Json:
    return config_json.write(config, _KEYS)


def weights(config: DecoderConfig) -> list[Weight]:
    def conv1d(name: str, path: str, part: int = 0, parts: int = 1) -> list[Weight]:
        # GPT-2 stores [in, out], as Linen does.
        return [
            Weight(f"{name}.weight", f"{path}/kernel", part=part, parts=parts),
            Weight(f"{name}.bias", f"{path}/bias", part=part, parts=parts),
        ]

    table = [
        Weight("transformer.wte.weight", "embeddings/tokens/embedding"),
        Weight("transformer.wpe.weight", "embeddings/positions/embedding"),
        *norm(config, "transformer.h.{}.ln_1", "blocks/attention_norm"),
        *conv1d("transformer.h.{}.attn.c_attn", "blocks/attention/query", 0, 3),
        *conv1d("transformer.h.{}.attn.c_attn", "blocks/attention/key", 1, 3),
        *conv1d("transformer.h.{}.attn.c_attn", "blocks/attention/value", 2, 3),
        *conv1d("transformer.h.{}.attn.c_proj", "blocks/attention/out"),
        *norm(config, "transformer.h.{}.ln_2", "blocks/mlp_norm"),
        *conv1d("transformer.h.{}.mlp.c_fc", "blocks/mlp/up"),
        *conv1d("transformer.h.{}.mlp.c_proj", "blocks/mlp/down"),
        *norm(config, "transformer.ln_f", "output/norm"),
    ]
    return table if config.tie_embeddings else [*table, Weight("lm_head.weight", "head/embedding")]
