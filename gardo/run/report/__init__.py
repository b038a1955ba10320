"""The report of one or several runs: one self-contained HTML file.

`load` reads a run folder, `tables` and `curves` turn it into rows and drawings, `build` fills
the template. Nothing here imports torch; matplotlib and jinja2 are imported when a report is
written, not before.
"""

from gardo.run.report.build import write_report
from gardo.run.report.load import ReportError, Run, load_run

__all__ = ["ReportError", "Run", "load_run", "write_report"]
