"""The structure of the package, read from its imports: one direction, no cycles."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "l2m_jax"

# Each may import from what stands before it, and from within itself.
ORDER = (
    "errors", "types", "files", "progress", "multihost", "preemption", "parallel", "products", "losses", "models", "data", "curriculum",
    "generation", "training", "evaluation", "methods", "config", "reporting", "run", "sweep", "plan", "bench", "cli",
)  # fmt: skip


def _modules() -> dict[str, Path]:
    """Dotted names below the package."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def _imports(file: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that `file` imports anywhere, also for type annotations."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("l2m_jax.") in modules else node.module)
    return {name.removeprefix("l2m_jax.") for name in found if name.startswith("l2m_jax.")}


def test_imports_go_one_way():
    modules = _modules()
    wrong = []
    for name, file in modules.items():
        if not name:
            continue
        own = ORDER.index(name.split(".")[0])
        wrong += [
            f"{name} imports {used}"
            for used in _imports(file, modules)
            if ORDER.index(used.split(".")[0]) > own
        ]
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    modules = _modules()
    graph = {name: _imports(file, modules) - {name} for name, file in modules.items()}
    # Raises CycleError.
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(modules)


def test_losses_import_jax_alone():
    modules = _modules()
    own = {name: file for name, file in modules.items() if name.split(".")[0] in ("losses", "products")}
    outside = {used for file in own.values() for used in _imports(file, modules)}
    assert outside <= own.keys()
