"""Human-readable numbers and names for the report."""

import math

Units = tuple[tuple[float, str], ...]  # scales with their units, largest first
BYTES: Units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
COUNTS: Units = ((1e6, "millions"), (1e3, "thousands"), (1.0, ""))
TIMES: Units = ((7200.0, "h"), (120.0, "min"), (1.0, "s"))


def unit_of(largest: float, units: Units) -> tuple[float, str]:
    """The scale and unit for values up to `largest`."""
    return next(((scale, unit) for scale, unit in units if largest >= scale), units[-1])


def labelled(name: str, unit: str) -> str:
    """An axis label: `loss (nats per token)`."""
    return f"{name} ({unit})" if unit else name


def byte_count(value: float) -> str:
    """`0 bytes`, `1.5 kB`, `23.4 MB`, in powers of 1000."""
    scale, unit = next(((scale, unit) for scale, unit in BYTES if value >= 0.9995 * scale), BYTES[-1])
    return f"{value / scale:,.0f} {unit}" if scale == 1 or value >= 999.5 * scale else f"{value / scale:.3g} {unit}"


def seconds(value: float) -> str:
    """A duration: `0.8 s`, `45 s`, `12 min 3 s`, `5 h 40 min`."""
    if not math.isfinite(value):
        return "?"
    if value < 59.5:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def short(value: float) -> str:
    """A number with three digits: `812`, `12.3k`, `4.56M`."""
    for scale, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def digits(value: float) -> str:
    """A number with about three digits: `1.59`, `12.3`, `1,358`."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def worker_of(member: object) -> str:
    """A worker's number, from its member id (`001-bbbbbbbb`)."""
    worker = str(member).partition("-")[0]
    return str(int(worker)) if worker.isdecimal() else str(member)


def plain(value: float, form: str) -> str:
    """The formatted number; "" if it is not finite."""
    return form.format(float(value)) if math.isfinite(value) else ""
