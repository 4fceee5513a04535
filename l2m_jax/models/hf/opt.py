"""OPT in Hugging Face's names. Only OPT-350M has norms after the sums, no final norm, and projected embeddings."""

from l2m_jax.models.architecture import DecoderConfig
from l2m_jax.models.hf import config_json
from l2m_jax.models.hf.config_json import Json, Key
from l2m_jax.models.hf.weights import Weight, dense, norm

ARCHITECTURE = "OPTForCausalLM"
PREFIX = "model."
IGNORED = None

DROPOUT = ("residual_dropout",)
RANDOM = {"activation": "relu", "position_offset": 2, "residual_dropout": 0.1}

_KEYS = {
    "vocab_size": Key("vocab_size", 50272),
    "hidden_size": Key("hidden_size", 768),
    "word_embed_proj_dim": Key("embed_size", None),
    "num_hidden_layers": Key("num_layers", 12),
    "num_attention_heads": Key("num_heads", 12),
    "ffn_dim": Key("intermediate_size", 3072),
    "max_position_embeddings": Key("max_positions", 2048),
    "do_layer_norm_before": Key("pre_norm", True),
    "layer_norm_elementwise_affine": Key("norm_affine", True),
    "activation_function": Key("activation", "relu"),
    "enable_bias": Key("attention_bias", True),
    "dropout": Key("residual_dropout", 0.1),
    "attention_dropout": Key("attention_dropout", 0.0),
    "init_std": Key("init_std", 0.02),
    "tie_word_embeddings": Key("tie_embeddings", True),
    "bos_token_id": Key("bos_token_id", 2),
    "eos_token_id": Key("eos_token_id", 2),
    "pad_token_id": Key("pad_token_id", 1),
}
# The config allows skipping whole layers in training; none of the published models was trained that way.
_REQUIRED = {"layerdrop": 0.0}


def read_config(hf: Json) -> DecoderConfig:
    fields = config_json.read(hf, _KEYS, _REQUIRED)
    width, heads = fields["hidden_size"], fields["num_heads"]
    fields["embed_size"] = fields["embed_size"] or width
    return DecoderConfig(
        family="opt",
        valid_vocab_size=fields["vocab_size"],
        num_kv_heads=heads,
        head_dim=config_json.head_dim(width, heads),
        mlp_bias=fields["attention_bias"],
        final_norm=fields["pre_norm"] and not hf.get("_remove_final_layer_norm", False),
        position_offset=2,
        **fields,
    )


def write_config(config: DecoderConfig) -> Json:
    return config_json.write(config, _KEYS) | {"_remove_final_layer_norm": not config.final_norm}


def weights(config: DecoderConfig) -> list[Weight]:
    decoder, layer, bias = "model.decoder", "model.decoder.layers.{}", config.attention_bias
    table = [
        Weight(f"{decoder}.embed_tokens.weight", "embeddings/tokens/embedding"),
        Weight(f"{decoder}.embed_positions.weight", "embeddings/positions/embedding"),
        *norm(config, f"{layer}.self_attn_layer_norm", "blocks/attention_norm"),
        *dense(f"{layer}.self_attn.q_proj", "blocks/attention/query", bias),
        *dense(f"{layer}.self_attn.k_proj", "blocks/attention/key", bias),
        *dense(f"{layer}.self_attn.v_proj", "blocks/attention/value", bias),
        *dense(f"{layer}.self_attn.out_proj", "blocks/attention/out", bias),
        *norm(config, f"{layer}.final_layer_norm", "blocks/mlp_norm"),
        *dense(f"{layer}.fc1", "blocks/mlp/up", bias),
        *dense(f"{layer}.fc2", "blocks/mlp/down", bias),
    ]
    if config.final_norm:
        table += norm(config, f"{decoder}.final_layer_norm", "output/norm")
    if config.embed_size != config.hidden_size:
        table += dense(f"{decoder}.project_in", "embeddings/project_in", bias=False)
        table += dense(f"{decoder}.project_out", "output/project_out", bias=False)
    return table if config.tie_embeddings else [*table, Weight("lm_head.weight", "head/embedding")]
