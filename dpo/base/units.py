"""Numbers with units, for people."""


def shown_bytes(number: float) -> str:
    """Returns bytes as `1,234.5 GiB`, or in MiB or KiB where they are fewer than one unit more."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number / 2**10:,.1f} KiB"


def shown_rate(number: float) -> str:
    """Returns bytes per second as `1.41 GB/s` or `320 MB/s`."""
    return f"{number / 1e9:.3g} GB/s" if number >= 1e9 else f"{number / 1e6:.3g} MB/s"


def shown_seconds(number: float) -> str:
    """Returns seconds; milliseconds below a tenth of a second, microseconds below a tenth of a millisecond."""
    if number >= 0.1:
        return f"{number:,.1f} s" if number >= 10 else f"{number:.2f} s"
    return f"{1e6 * number:.2g} µs" if 0 < number < 0.95e-4 else f"{1000 * number:.1f} ms"


def shown_duration(seconds: float) -> str:
    """Returns a duration as hours, as minutes below two hours, or as seconds below two minutes."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.0f} min" if seconds >= 120 else shown_seconds(seconds)
