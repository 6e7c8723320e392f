"""The measured figures of the documentation: JSON in `docs/results/`, tables and plots made from it.

A page holds blocks, which `make results` fills:

    <!-- results: compare-demo -->
    ... the table of docs/results/compare-demo.json, with its commands and conditions ...
    <!-- /results -->

The name of a block is that of a file, one of `SPECIAL_BLOCKS` in `scripts/results/blocks.py`, or a single figure within
a line: `<!-- results: demo/3 bits/loss_nats:.3f -->0.003<!-- /results -->`.
"""
