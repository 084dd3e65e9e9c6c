"""The adaptation service's status as flat numbers, ready to become metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COUNTERS = frozenset({"learned", "flagged", "lost_events", "decisions"})
_DOMAIN_FIELDS = ("acceptance", "cycles", "requests", "changes")


def flat_numbers(status: Mapping[str, Any], max_domains: int) -> dict[str, Any]:
    """Flattens ``asdict(BanditStatus)``.

    Args:
        status: the service's status; numbers and ``..._by_<label>`` mappings that are flat already stay as they are.
        max_domains: of the domains, the busiest so many are kept; acceptance of the others cannot be added up.

    Returns:
        Numbers by metric name, those ending in ``_total`` being counters, and mappings of label value to number
        named ``<metric>_by_<label>`` or ``<metric>_by_<label>_total``.
    """
    flat: dict[str, Any] = {}
    for key, value in status.items():
        if key == "balance" and isinstance(value, Mapping):
            flat |= {f"balance_{name}": number for name, number in value.items()}
        elif key == "counters" and isinstance(value, Mapping):
            flat |= {f"loop_{name}_total": number for name, number in value.items()}
        elif key == "domains" and isinstance(value, Sequence):
            flat |= _by_domain(value, max_domains)
        elif key == "stage" and isinstance(value, str):
            flat["stage_by_stage"] = {value: 1}
        else:
            flat[f"{key}_total" if key in _COUNTERS else key] = value
    return flat


def _by_domain(domains: Sequence[Mapping[str, Any]], max_domains: int) -> dict[str, dict[str, float]]:
    busiest = sorted(domains, key=lambda each: (-each["cycles"], each["domain"]))[:max_domains]
    return {f"{name}_by_domain": {each["domain"]: each[name] for each in busiest} for name in _DOMAIN_FIELDS}
