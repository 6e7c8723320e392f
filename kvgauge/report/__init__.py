"""The report of an evaluation: figures are gathered as JSON, and the page is made from nothing else.

`kvgauge report FOLDER/report.json` makes the page again.
"""
