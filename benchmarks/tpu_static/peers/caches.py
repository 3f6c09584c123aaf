"""Which dtypes of a cache a peer is given, in the words of its refusal."""

from benchmarks.work import Work

FLOAT8 = "float8_e4m3fn"  # stored by whoever calls: new keys come in it, their scale is 1


def refused_cache(work: Work, *taken: str) -> str | None:
    """Why a work's cache is none of those taken; None = it is, or there is none."""
    if work.page_size is None or work.cache_dtype in taken:
        return None
    return f"cache_dtype is {work.cache_dtype}, must be {' or '.join(taken)}"
