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
        "--report", type=Path, metavar="FOLDER", help="write report.html, to be looked at, and report.json behind it"
    )
    group.add_argument(
        "--report-compare",
        type=Path,
        metavar="FILE",
        help="results.json of compare_recipes, whose recipes are shown beside this one",
    )
    group.add_argument(
        "--report-windows",
        type=options.positive,
        metavar="N",
        help="windows from which the losses and errors of single layers are taken, each quantized alone: one pass for "
        f"the keys and one for the values of every layer (default: {REPORT_WINDOWS})",
    )


def check_report_options(config: ReportConfig) -> None:
    """Finds out before the model runs what would keep the report from being written; makes its folder.

    Raises
    ------
    UsageError
        If there can be no such folder, or the file to compare with is not what `compare_recipes` writes.
    """
    if config.report is None:
        refuse_given(config, ("report_compare", "report_windows"), "no report is asked for; add --report FOLDER")
        return
    from kvgauge.report.compared import compared

    if config.report_compare is not None:
        compared(config.report_compare, None)
    output_folder(config.report, "--report")
