"""Write a number of bytes in the unit in which people read it, the same in errors, reports and descriptions."""

_UNITS = (("kB", 1e3, 1), ("MB", 1e6, 1), ("GB", 1e9, 2))


def as_bytes(n: float) -> str:
    """Return a size in bytes, kB, MB or GB: no size but none is 0."""
    if round(n) < 1000:
        return f"{n:.0f} byte{'s' * (round(n) != 1)}"
    # the unit is chosen by what is shown: 999,960 bytes are 1.0 MB, not 1000.0 kB
    name, unit, digits = next((one for one in _UNITS if round(n / one[1], one[2]) < 1000), _UNITS[-1])
    return f"{n / unit:.{digits}f} {name}"
