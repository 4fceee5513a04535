"""What a run needs on given cards: `python -m l2m_jax.plan --config FILE --target a100_80gb --devices 4 --json out.json`.

No card is needed, no weights and no data. Settings are changed as in train.py, as in
`--config.devices.mapping=fsdp`. The exit status is 0 whether or not the run fits: `fits` says it.
"""

import os

# Read when jax starts: nothing here runs on a card, and its compiler's notes on missing ones help nobody.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from l2m_jax import files
from l2m_jax.cli.common import parse_flags, refuse
from l2m_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, as in configs/gpt2_small.py")
_TARGET = flags.DEFINE_string(
    "target", "a100_80gb", "The card: a100_80gb, h100_80gb, a TPU as in v5e:4x4, or cpu"
)
_DEVICES = flags.DEFINE_integer("devices", 1, "How many of them")
_JSON = flags.DEFINE_string("json", None, "File to write all figures to")
flags.mark_flag_as_required("config")


def _config_file() -> str:
    return flags.FLAGS["config"].config_filename  # pyright: ignore[reportAttributeAccessIssue]


def _main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    logging.set_verbosity(logging.ERROR)
    try:
        from l2m_jax import config as settings
        from l2m_jax.plan import plan, report

        if _TARGET.value == "cpu":
            jax.config.update("jax_num_cpu_devices", max(1, _DEVICES.value))
        config = settings.parse(_CONFIG.value)
        found = plan.make(config, _TARGET.value, _DEVICES.value)
        tried = [] if found.fits else plan.what_would_fit(config, found)
        document = {"config": _config_file()} | plan.document(found, tried)
        if _JSON.value:
            files.write_json(Path(_JSON.value), document)
        report.show(document)
    except InputError as error:
        refuse(str(error))


def main() -> None:
    app.run(_main, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
