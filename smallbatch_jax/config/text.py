"""How numbers are written for people."""


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min; ? if not known."""
    if seconds != seconds:
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
