"""Distils a student: `python train.py --config configs/quickstart.py --workdir runs/quickstart`.

Any setting can be changed on the command line, as in `--config.training.learning_rate=5e-5`. The same command
again goes on where the first one stopped.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from l2m_jax.cli.common import parse_flags, refuse
from l2m_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, as in configs/quickstart.py:compare"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything the run makes is kept", required=True)
flags.mark_flag_as_required("config")


def _main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every checkpoint otherwise
    try:
        from l2m_jax import config, multihost
        from l2m_jax.run import pipeline

        parsed = config.parse(_CONFIG.value)
        multihost.start(parsed.devices)
        pipeline.run(parsed, _WORKDIR.value)
    except InputError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the last checkpoint")


def main() -> None:
    app.run(_main, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
