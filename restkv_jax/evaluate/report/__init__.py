"""The report of a sweep: tables with intervals and tests, pictures, one HTML file and the same as Markdown."""

from restkv_jax.evaluate.report.page import TITLE, write_report

__all__ = ["TITLE", "write_report"]
