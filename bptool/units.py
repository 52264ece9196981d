"""Quantities as a person reads them. GiB is 2^30 bytes and GB is 10^9; one is never written for the other."""

from __future__ import annotations

import re

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40


def gib(n_bytes: int) -> float:
    """Bytes in GiB."""
    return n_bytes / GIB


def format_bytes(n_bytes: int) -> str:
    """`512 B`, `1.50 KiB`, `13.92 GiB`: three significant places or more, binary units."""
    for size, unit in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes} B"


def parse_bytes(text: str) -> int:
    """`24GiB`, `24 GB`, `80g`: GiB is 2^30 bytes, GB is 10^9, and a bare letter is the binary unit.

    Raises:
        ValueError: it is no quantity of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"'{text}' is no quantity of memory")
    number, prefix, binary, byte = found.groups()
    if binary and not prefix:
        raise ValueError(f"'{text}' is no quantity of memory")
    base = 1000 if prefix and byte and not binary else 1024
    return int(float(number) * base ** (" kmgt".index(prefix.lower()) if prefix else 0))


def format_count(n: float) -> str:
    """`999`, `1.25K`, `124.44M`, `8.03B`: parameters and tokens, decimal."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(n) >= size:
            return f"{n / size:.2f}{unit}"
    return f"{n:.0f}"


def format_rate(per_second: float, unit: str) -> str:
    """`173.2 GFLOP/s`: a rate with a decimal prefix."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(per_second) >= size:
            return f"{per_second / size:.1f} {prefix}{unit}/s"
    return f"{per_second:.1f} {unit}/s"


def format_flops(n: float) -> str:
    """`512 FLOP`, `1.25 kFLOP`, `382.14 GFLOP`: a number of operations with a decimal prefix."""
    for size, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.2f} {prefix}FLOP"
    return f"{n:.0f} FLOP"


def format_duration(seconds: float) -> str:
    """`12.50 µs`, `1.25 ms`, `3.20 s`, `2m 05s`, `3h 07m`, `2d 04h`, `4.2 years`."""
    if 0 < abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.2f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.2f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {minutes:02d}m"
    days, hours = divmod(hours, 24)
    if days >= 1000:
        return f"{days / 365.25:,.1f} years"
    return f"{days}d {hours:02d}h"
