"""Options of the command line for the report of an evaluation."""

import argparse
from pathlib import Path

from kvgauge.cli.options import common as options
from kvgauge.configuration.fields import refuse_given
from kvgauge.configuration.report import REPORT_WINDOWS, ReportConfig
from kvgauge.terminal.outputs import output_folder


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Adds the folder of the report, a comparison to show in it, and the windows behind its figures."""
    group = parser.add_argument_group("report")
    group.add_argument(
        "--report", type=Path, metavar="FOLDER", help="write FOLDER/report.html, and its figures as report.json"
    )
    group.add_argument(
        "--report-compare",
        type=Path,
        metavar="FILE",
        help="results.json of `kvgauge compare`: show its recipes beside this run",
    )
    group.add_argument(
        "--report-windows",
        type=options.positive,
        metavar="N",
        help="windows for the losses and errors of single layers; adds two passes per layer "
        f"(default: {REPORT_WINDOWS})",
    )


def check_report_options(config: ReportConfig) -> None:
    """Checks before the model runs that the report can be written; makes its folder.

    Raises
    ------
    UsageError
        If there can be no such folder, or the file to compare with is not what `kvgauge compare` writes.
    """
    if config.report is None:
        refuse_given(config, ("report_compare", "report_windows"), "no effect without a report; add --report FOLDER")
        return
    from kvgauge.report.compared import compared

    if config.report_compare is not None:
        compared(config.report_compare, None)
    output_folder(config.report, "--report")
