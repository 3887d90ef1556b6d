"""JSON that every parser accepts: numbers that are not finite are written as ``null``.

Python writes NaN and infinities as ``NaN`` and ``Infinity``, which RFC 8259 does not allow and which
JavaScript, jq and strict parsers refuse. Files of runs, of benchmarks and of pages are written with
:func:`dumps`; a linter's rule refuses :func:`json.dumps` outside of this module, except for digests.
"""

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """Like :func:`json.dumps`, with ``null`` in place of numbers that are not finite.

    Args:
        value: Anything that :func:`json.dumps` takes.
        options: Passed on to it.
    """
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """A value with ``None`` in place of numbers that are not finite, in tables and lists at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {finite_key(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def finite_key(key: Any) -> Any:
    """A key of a table; numbers that are not finite become text, as JSON's keys are."""
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
