"""Progress bars: what is done, its rate and the time left, often on a terminal and every half minute in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    what: str, total: int | None, unit: str = "img", items: Iterable[Any] | None = None, **options: Any
) -> tqdm:
    """A bar over ``items``, or one that the caller updates; without a total it shows no time left."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(items, total=total, desc=what, unit=unit, mininterval=interval, **options)
