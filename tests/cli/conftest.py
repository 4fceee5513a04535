from collections.abc import Callable

import pytest

from l2m_jax.cli.main import main


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """`refused("train", "--config=x")` gives the one sentence with which the command line is refused."""

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
        return said.err.removeprefix("error: ").rstrip("\n")

    return refused
