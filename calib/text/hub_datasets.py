"""Data sets of the papers, from the hub or its local cache."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from calib.text.errors import CorpusError

logger = logging.getLogger(__name__)

_HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """Location of a data set on the hub, and the conversion of its rows to text.

    Parameters
    ----------
    repository, config, revision : str or None
        Arguments of `datasets.load_dataset`.
    evaluation : str
        Split for evaluation; calibration uses `train`.
    files : Mapping[str, str]
        Single file to read of each split, where that is not the whole split.
    column : str
        Column of the text.
    separator : str or None
        Joins all rows into one stream; None makes every row a document.
    local_example : str
        Example of a local copy's path, for messages.
    """

    repository: str
    config: str | None = None
    revision: str | None = None
    evaluation: str = "test"
    files: Mapping[str, str] = field(default_factory=dict)
    column: str = "text"
    separator: str | None = None
    local_example: str

    def rows(self, part: str) -> Sequence[str]:
        """Texts of one split."""
        import datasets

        loaded = datasets.load_dataset(
            self.repository,
            self.config,
            revision=self.revision,
            data_files={part: self.files[part]} if self.files else None,
            split=part,
            # The dataset card counts all shards; against one of them the check fails (datasets issue 7728).
            verification_mode="no_checks" if self.files else None,
        )
        rows: Sequence[str] = loaded[self.column]
        return rows


SELF = "self"
"""Name of the text that a model writes itself."""

# wikitext2 and c4 as in KVQuant; ptb as GPTQ's `ptb_new` (joined by a space, evaluated on test), the variant that
# published tables quote. Its older `ptb` joins by blank lines and evaluates on validation.
HUB_DATASETS = {
    "wikitext2": HubDataset(
        repository="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        separator="\n\n",
        local_example="path/to/wiki.train.raw",
    ),
    "ptb": HubDataset(
        repository="ptb-text-only/ptb_text_only",
        config="penn_treebank",
        revision="refs/convert/parquet",  # the main branch is a loading script, which datasets no longer runs
        column="sentence",
        separator=" ",
        local_example="path/to/ptb.train.txt",
    ),
    "c4": HubDataset(
        repository="allenai/c4",
        revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
        evaluation="validation",
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        local_example="path/to/c4.txt",
    ),
}

KNOWN_DATASETS = ("demo", *HUB_DATASETS, "kjv", SELF)
"""Names of data sets; any other name is a path."""


def hub_rows(name: str, part: str) -> Sequence[str]:
    """Texts of one split of a data set.

    Raises
    ------
    CorpusError
        If neither the hub nor its local cache has them.
    """
    dataset = HUB_DATASETS[name]
    try:
        with _offline_if_unreachable():
            return dataset.rows(part)
    except Exception as error:  # datasets and the hub client raise from a dozen unrelated hierarchies
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CorpusError(
            f"{name}: expected {dataset.repository} from the hub or its local cache; got {cause}; pass a local file "
            f"instead, e.g. --dataset {dataset.local_example}, or .jsonl with a field `text`"
        ) from error


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Sets `datasets` to offline mode inside the context if the hub does not answer."""
    # Without a network the hub client retries for 23 s before it uses its cache; in offline mode it uses it at once.
    import datasets

    # `datasets` read its flag at import: setting the environment variable now would have no effect.
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not hub_answers(datasets.config.HF_ENDPOINT)
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def hub_answers(endpoint: str) -> bool:
    """True if the hub answers one request within a few seconds."""
    from huggingface_hub import get_session  # the client that datasets uses: same proxies, same certificates

    try:
        get_session().head(endpoint, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:  # the client's exceptions changed their package twice
        logger.warning("no answer from %s (%s): looking only into the local cache", endpoint, error)
        return False
    return True
