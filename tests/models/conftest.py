import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def write_model():
    """write_model(folder, name, **changes to config.json): a golden case as a Hugging Face folder; its tensors."""
    cases = json.loads((GOLDEN / "cases.json").read_text())
    prefix = "weight/"

    def write(folder: Path, name: str = "gpt2", **changes):
        golden = load_file(GOLDEN / f"{name}.safetensors")
        tensors = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(cases[name] | changes))
        return tensors

    return write
