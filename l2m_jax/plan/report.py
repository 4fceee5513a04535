"""A plan on the screen."""

from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from l2m_jax.progress import console

_GIB = 2**30
_WIDTH_IN_FILES = 160


def show(document: dict[str, Any]) -> None:
    """Prints what `plan.document` returns."""
    d = document
    shown = (
        console if console.is_terminal else Console(width=_WIDTH_IN_FILES, highlight=False, soft_wrap=True)
    )
    total, card = d["bytes_per_device"]["total"] / _GIB, d["memory_of_card"] / _GIB
    shown.print(
        f"{d['verdict']}: {total:.1f} of {card:.1f} GiB on a device ({d['largest_phase']}, {d['largest_moment']}), "
        f"{d['devices']} × {d['target']}, {d['mapping']}"
    )
    shown.print("  " + _parts(d["bytes_per_device"]))
    if d["needs_larger_memory_fraction"]:
        shown.print("  by default, JAX preallocates 75% of a GPU's memory")
    host = d["host"]
    shown.print(f"host of a process: {_parts(host['bytes'])} ({host['phase']}, {host['moment']})")
    shown.print(_phases(d))
    _checkpoints(d, shown)
    _step(d, shown)
    shown.print(
        f"compiled in {d['compile_seconds']:.0f} s; a run compiles {d['compilations']['total']} programs"
    )
    estimate = d["estimate"]
    shown.print(
        f"estimate, {estimate['basis']}:\n  a step {1e3 * estimate['step_seconds']:.3g} ms, "
        f"the run {estimate['hours']:.2g} hours ({d['updates']:,} updates of the student)"
    )
    for assumption in d["assumptions"]:
        shown.print(f"assumed: {assumption}")
    for change in d["would_fit"]:
        shown.print(_change(change, d["devices"]))


def show_programs(document: dict[str, Any]) -> None:
    """Prints what each program of a `plan.document` is made of."""
    table = Table(box=box.SIMPLE, title="The compiled programs")
    for name in (
        "program",
        "size",
        "products by dtype",
        "attention",
        "repeated indices",
        "largest array",
        "collectives",
    ):
        table.add_column(name)
    programs = {
        (program["name"], program["size"], phase["name"]): program
        for phase in document["phases"]
        for program in phase["programs"]
    }
    for (name, size, phase), p in programs.items():
        largest = p["largest_buffers"][0] if p["largest_buffers"] else None
        table.add_row(
            f"{phase}: {name}",
            size,
            ", ".join(f"{100 * share:.0f}% {dtype}" for dtype, share in p["products"].items()) or "–",
            ", ".join(p["attention_kernels"]) or "plain",
            _repeated(p["scatters"]) or "–",
            f"{largest['shape']} {largest['bytes'] / 2**20:,.0f} MiB" if largest else "–",
            _collectives(p["collectives"]) or "–",
        )
    (console if console.is_terminal else Console(width=_WIDTH_IN_FILES, highlight=False)).print(table)


def _repeated(scatters: list[dict[str, Any]]) -> str:
    """Arrays that rows which may repeat are added or written to."""
    shapes = Counter(s["shape"] for s in scatters if not s["unique"])
    return ", ".join(f"{count} × {shape}" if count > 1 else shape for shape, count in shapes.items())


def _collectives(found: list[dict[str, Any]]) -> str:
    """Bytes by kind, and how much of them overlaps with other work."""
    listed = []
    for kind in dict.fromkeys(c["kind"] for c in found):
        sizes = [(c["bytes"] * c["count"], c["overlaps"]) for c in found if c["kind"] == kind]
        total = sum(size for size, _ in sizes)
        beside = sum(size for size, overlaps in sizes if overlaps) / total if total else 0.0
        listed.append(f"{kind} {total / 1e9:.3g} GB, {100 * beside:.0f}% overlapped")
    return "; ".join(listed)


def _parts(sizes: dict[str, float]) -> str:
    """The parts of a total, largest first."""
    parts = sorted(((n, s) for n, s in sizes.items() if n != "total" and s), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts)
    return f"{sizes['total'] / _GIB:.1f} GiB ({listed})" if parts else f"{sizes['total'] / _GIB:.1f} GiB"


def _phases(d: dict[str, Any]) -> Table:
    """The fullest moment of each phase."""
    table = Table(box=box.SIMPLE, title="GiB on a device, at the fullest moment of each phase")
    columns = list(d["bytes_per_device"])
    for name in ("phase", "moment"):
        table.add_column(name)
    for name in (*columns, "host", "hours (est.)"):
        table.add_column(name, justify="right")
    for phase in d["phases"]:
        fullest = max(phase["moments"], key=lambda moment: moment["bytes_per_device"]["total"])
        host = max(moment["host"]["total"] for moment in phase["moments"])
        sizes = [*fullest["bytes_per_device"].values(), host]
        hours = d["estimate"]["hours_by_phase"][phase["name"]]
        listed = [f"{size / _GIB:.2f}" for size in sizes]
        table.add_row(phase["name"], fullest["name"], *listed, f"{hours:.2g}")
    return table


def _checkpoints(d: dict[str, Any], shown: Console) -> None:
    c = d["checkpoints"]
    of_phases = ", ".join(
        f"{name} at most {p['count']} of {p['bytes'] / 1e9:.2f} GB" for name, p in c["phases"].items()
    )
    shown.print(
        f"checkpoints: {of_phases}; {c['bytes_written'] / 1e9:.0f} GB in all, {c['seconds']:.0f} s of writing at "
        f"{c['disk_rate'] / 1e9:g} GB/s"
    )
    store = c["disk"].get("teacher store")
    shown.print(
        f"disk: at most {c['peak_bytes_on_disk'] / 1e9:.1f} GB at a time"
        + (f", {store / 1e9:.2f} GB of it the teacher store" if store else "")
    )


def _step(d: dict[str, Any], shown: Console) -> None:
    collectives = d["collectives_per_step"]
    counts = ", ".join(f"{count:.2g} of {shape}" for shape, count in d["micro_batches_per_step"].items())
    shown.print(
        f"a step: {d['flops_per_step'] / 1e12:.3g} TFLOP; {collectives['bytes'] / 1e9:.3g} GB in collectives, "
        f"{1e3 * collectives['seconds']:.3g} ms of them on the wire; micro-batches {counts}"
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


def _change(change: dict[str, Any], devices: int) -> str:
    settings = " ".join(f"--config.{name}={value}" for name, value in change["settings"].items())
    if change["devices"] != devices:
        settings += f" --devices {change['devices']}"
    total = f"{change['total'] / _GIB:.1f} GiB"
    if change["fits"]:
        return f"would fit ({total}): {settings}"
    return f"would not fit ({total}{'' if change['compiled'] else ' before any temporaries'}): {settings}"
