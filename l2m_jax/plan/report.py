"""A plan on the screen."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from l2m_jax.progress import console

_GIB = 2**30
_WIDTH_IN_FILES = 160


def show(document: dict[str, Any]) -> None:
    d = document
    shown = (
        console if console.is_terminal else Console(width=_WIDTH_IN_FILES, highlight=False, soft_wrap=True)
    )
    memory = d["bytes_per_device"]
    total, card = memory["total"] / _GIB, d["memory_of_card"] / _GIB
    verdict = "fits" if d["fits"] else "does not fit"
    shown.print(
        f"{verdict}: {total:.1f} of {card:.1f} GiB on a device ({d['largest_phase']}), "
        f"{d['devices']} × {d['target']}, {d['mapping']}"
    )
    if d["needs_larger_memory_fraction"]:
        shown.print("  set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: by default jax takes 75 % of a card's memory")
    shown.print(_phases(d))
    collectives, estimate = d["collectives_per_step"], d["estimate"]
    shown.print(
        f"a step: {d['flops_per_step'] / 1e12:.3g} TFLOP; {collectives['bytes'] / 1e9:.3g} GB in collectives, "
        f"{1e3 * collectives['seconds']:.3g} ms of them on the wire; micro-batches {_counts(d)}"
    )
    for name, uses in d["attention"].items():
        how = f"cuDNN ({', '.join(uses['custom_calls'])})" if uses["cudnn"] else f"plain: {uses['why_not']}"
        shown.print(f"attention of the {name}: {how}")
    shown.print(
        "largest buffers of the student's step: "
        + ", ".join(f"{b['shape']} {b['bytes'] / 2**20:,.0f} MiB" for b in d["largest_buffers"][:5])
    )
    if logits := d["largest_logits"]:
        shown.print(f"largest logits: {logits['shape']}, of {logits['of']} slots in the micro-batch")
    shown.print(
        f"compiled in {d['compile_seconds']:.0f} s; a run compiles {d['compilations']['total']} programs"
    )
    shown.print(
        f"estimate, {estimate['basis']}:\n  a step {1e3 * estimate['step_seconds']:.3g} ms, "
        f"the run {estimate['hours']:.2g} hours ({d['updates']:,} updates of the student)"
    )
    for assumption in d["assumptions"]:
        shown.print(f"assumed: {assumption}")
    for change in d["would_fit"]:
        shown.print(_change(change, d["devices"]))


def _counts(d: dict[str, Any]) -> str:
    return ", ".join(f"{count:.2g} of {shape}" for shape, count in d["micro_batches_per_step"].items())


def _phases(d: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, title="GiB on a device")
    columns = list(d["phases"][0]["bytes_per_device"])
    table.add_column("phase")
    for name in (*columns, "hours (est.)", "compile s"):
        table.add_column(name.replace("_", " "), justify="right")
    for phase in d["phases"]:
        sizes = [f"{phase['bytes_per_device'][name] / _GIB:.2f}" for name in columns]
        hours = d["estimate"]["hours_by_phase"][phase["name"]]
        compiled = sum(p["compile_seconds"] for p in phase["programs"])
        table.add_row(phase["name"], *sizes, f"{hours:.2g}", f"{compiled:.0f}")
    return table


def _change(change: dict[str, Any], devices: int) -> str:
    settings = " ".join(f"--config.{name}={value}" for name, value in change["settings"].items())
    if change["devices"] != devices:
        settings += f" --devices {change['devices']}"
    total = f"{change['total'] / _GIB:.1f} GiB"
    if change["fits"]:
        return f"would fit ({total}): {settings}"
    return (
        f"would not fit ({total}{'' if change['compiled'] else ' that stay on a device alone'}): {settings}"
    )
