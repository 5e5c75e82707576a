"""The one error of this package, so that every caller can show it to the user as it is."""

from __future__ import annotations


class ModelError(ValueError):
    """A model reference, its files or its architecture cannot be used; the message says why and what is allowed."""
