"""Reports on a run folder: plots, one self-contained HTML page, a table before → after."""

from rlstab.report._page import write_report
from rlstab.report._plots import write_plots
from rlstab.report._summary import SummaryRow, print_summary, summary

__all__ = ["SummaryRow", "print_summary", "summary", "write_plots", "write_report"]
