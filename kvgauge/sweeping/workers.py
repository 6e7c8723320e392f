"""Workers of a sweep: this process, several, or a cluster."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from joblib import Parallel, delayed, parallel_config

from kvgauge.terminal.console import UsageError, bar, say

Backend = Literal["loky", "dask", "ray"]

_PACKAGES = {"dask": "distributed", "ray": "ray"}

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Processes that share the folder of the sweep.

    Parameters
    ----------
    jobs : int
        Cells at a time; of a cluster that is started here, its workers. 1 with `loky` is this process.
    backend : {'loky', 'dask', 'ray'}
        Processes of joblib, or a cluster, where its package is installed.
    scheduler : str or None
        Address of a Dask cluster that runs already, where the grid's paths mean the same; None starts one here.

    Raises
    ------
    UsageError
        If the package of the backend is not installed.
    """

    jobs: int = 1
    backend: Backend = "loky"
    scheduler: str | None = None

    def __post_init__(self) -> None:
        package = _PACKAGES.get(self.backend, "joblib")
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"--backend {self.backend}: the package {package} is not installed; type pip install {package}"
            )
        if self.scheduler and self.backend != "dask":
            raise UsageError("--scheduler: no effect without a Dask cluster; add --backend dask")

    @contextmanager
    def started(self) -> Iterator[None]:
        """Inside the context the workers are there; afterwards a cluster that was started here is gone."""
        with ExitStack() as stack:
            options: dict[str, Any] = {"backend": self.backend, "n_jobs": self.jobs}
            if self.backend == "dask":
                stack.enter_context(self._client())
                del options["n_jobs"]  # the cluster is as wide as it is
            elif self.backend == "ray":
                _register_ray()
            stack.enter_context(parallel_config(**options))
            yield

    def errors(self, function: Callable[[Item], object], items: Sequence[Item], what: str) -> list[str | None]:
        """Calls a function, which can be imported by its name, for each item; what it raised, None for nothing.

        Where a worker dies, all others may die with it: what is not known to be finished is called once more, alone.
        """
        # A worker that is killed, most often for memory, breaks the pool. Results come in order, so that the length of
        # `found` tells which items are left.
        found: list[str | None] = []
        try:
            found.extend(bar(self._called(function, items), what))
        except Exception as error:  # those of the function are in `found`
            say(f"a worker died ({type(error).__name__}); the other items run one at a time")
            found.extend(self._called_alone(function, item) for item in items[len(found) :])
        return found

    def _called_alone(self, function: Callable[[Item], object], item: Item) -> str | None:
        try:
            [error] = self._called(function, [item])
        except Exception as error:
            return f"its worker died, perhaps out of memory ({type(error).__name__}); use fewer --jobs"
        return error

    def _called(self, function: Callable[[Item], object], items: Iterable[Item]) -> Iterator[str | None]:
        way = "list" if self.backend == "ray" else "generator"  # Ray's pool hands over everything at the end
        yield from Parallel(return_as=way, batch_size=1)(delayed(_error)(function, item) for item in items)

    def _client(self) -> Any:
        client = importlib.import_module("distributed").Client  # has no types where it is not installed
        if self.scheduler:
            return client(self.scheduler)
        return client(n_workers=self.jobs, threads_per_worker=1, processes=True, dashboard_address=None)


def _error(function: Callable[[Item], object], item: Item) -> str | None:
    """The error of a call, None for none; joblib inside it stays in its thread, for cells are many enough."""
    try:
        with parallel_config(backend="sequential"):
            function(item)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _register_ray() -> None:
    importlib.import_module("ray.util.joblib").register_ray()
