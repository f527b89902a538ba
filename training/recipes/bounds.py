"""Checks of settings against their bounds, in the one form of message."""

import math
from typing import Any


class BoundedSettings:
    """Settings that refuse a value in one line."""

    def require(self, name: str, holds: bool, allowed: str) -> None:
        """Raise a one-line ValueError unless the setting holds.

        Args:
            name: The setting.
            holds: Whether its value is allowed.
            allowed: What is.
        """
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {allowed}")


def require_at_least(settings: Any, bounds: dict[int, tuple[str, ...]]) -> None:
    """Raise a one-line ValueError unless each setting is finite and not below its bound; null is allowed.

    Args:
        settings: The settings.
        bounds: Names by bound.
    """
    for least, names in bounds.items():
        for name in names:
            value = getattr(settings, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name}: got {value}, expected {least} or more")
