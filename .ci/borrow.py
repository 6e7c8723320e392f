"""Gives a virtual environment packages of the one that runs this, without installing them a second time.

`borrow.py all PYTHON` puts all of them behind the own packages of PYTHON's environment. `borrow.py PACKAGE PYTHON`
links what PACKAGE, installed there, declares as its dependencies, what these declare in turn, and nothing else.
"""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def site_packages(python: str) -> Path:
    """Folder of an interpreter's packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def declared(distribution: metadata.Distribution, extras: set[str]) -> list[Requirement]:
    """Requirements of a distribution that hold here, for the extras asked for."""
    found = [Requirement(text) for text in distribution.requires or []]
    environments = [{"extra": extra} for extra in extras or {""}]
    return [each for each in found if each.marker is None or any(map(each.marker.evaluate, environments))]


def closure(wanted: list[Requirement]) -> dict[str, metadata.Distribution]:
    """Distributions behind requirements, by name, with all that they require."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        requirement = wanted.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        key = (name, frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            found[name] = metadata.distribution(name)
            wanted += declared(found[name], requirement.extras)
    return found


def link(distribution: metadata.Distribution, into: Path) -> None:
    """Links the top-level files and folders of a distribution; folders that several share become folders of links."""
    for file in distribution.files or []:
        source = Path(str(distribution.locate_file(file)))
        if ".." in file.parts or "__pycache__" in file.parts or not source.exists():
            continue  # programs and their manuals
        target = into / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(source)


def main(what: str, python: str) -> None:
    """Borrows `what` for the environment of the interpreter `python`."""
    into = site_packages(python)
    if what == "all":
        own = site_packages(sys.executable)
        (into / "borrowed.pth").write_text(f"import site; site.addsitedir({str(own)!r})\n")
        return
    [borrower] = metadata.distributions(name=what, path=[str(into)])
    found = closure(declared(borrower, set()))
    for distribution in found.values():
        link(distribution, into)
    print(f"{what}: {len(found)} packages are declared as dependencies")


if __name__ == "__main__":
    main(*sys.argv[1:])
