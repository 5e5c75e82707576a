"""Tandem: LLM serving with prefill and decode in separate worker pools. See README.md and ARCHITECTURE.md."""

__version__ = "0.1.0"
