"""Fetches the packages of corpus_sources.toml and reads their files; used by build_corpus.py."""

import fnmatch
import io
import lzma
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from _corpus_forms import FORMS, read_documents
from _corpus_text import drop_navigation

from moejax.errors import BackendError, BadFileError, UsageError


class Source(NamedTuple):
    """A table of corpus_sources.toml: a package and what is taken from it."""

    registry: str
    name: str
    version: str
    licence: str
    form: str
    take: Mapping[str, Sequence[str]]
    skip: Sequence[str]
    inner: str


def read_sources(path: Path) -> list[Source]:
    """Reads the list of packages.

    Raises:
      BadFileError: The file is missing or a table lacks a field or names an unknown form.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadFileError(f"cannot read {path}: {error}", "Name a list with --sources.") from None
    sources = []
    for registry, packages in tables.items():
        for name, fields in packages.items():
            try:
                source = Source(
                    registry,
                    name,
                    fields.get("version", ""),
                    fields["licence"],
                    fields["form"],
                    fields["take"],
                    fields.get("skip", ()),
                    fields.get("inner", ""),
                )
            except KeyError as error:
                raise BadFileError(f"{path}: {name} has no {error}", "Add the field.") from None
            if source.form not in FORMS or registry not in ("debian", "npm"):
                raise BadFileError(
                    f"{path}: {name} has registry {registry!r} and form {source.form!r}",
                    f"Registries are debian and npm; forms are {', '.join(FORMS)}.",
                )
            sources.append(source)
    return sources


def fetch(source: Source, cache: Path) -> Path:
    """Returns the package's file in the cache, downloaded if it is not there.

    Raises:
      UsageError: The registry's client is not installed.
      BackendError: The client failed.
    """
    folder = cache / source.registry
    folder.mkdir(parents=True, exist_ok=True)
    if source.registry == "debian":
        pattern, command = f"{source.name}_*.deb", ["apt-get", "-q", "download", source.name]
    else:
        pattern = f"{source.name.lstrip('@').replace('/', '-')}-{source.version}.tgz"
        command = ["npm", "pack", "--silent", f"{source.name}@{source.version}"]
    if not list(folder.glob(pattern)):
        _say(f"downloading {source.name} {source.version}".rstrip())
        if shutil.which(command[0]) is None:
            raise UsageError(
                f"{command[0]} is not installed, and {source.name} is not in {folder}",
                f"Install {command[0]}, or put {pattern} there.",
            )
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode or not list(folder.glob(pattern)):
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise BackendError(
                f"{shlex.join(command)} failed: {lines[-1]}",
                "Check the network; for Debian packages run apt-get update once.",
            )
    return max(folder.glob(pattern))


def read_packages(packages: Sequence[tuple[Source, Path]]) -> dict[str, list[str]]:
    """Returns the uncleaned documents of each domain.

    Raises:
      BadFileError: A package has nothing to take for one of its domains.
    """
    found: dict[str, list[str]] = {}
    for source, path in packages:
        _say(f"reading {source.name}")
        taken: dict[str, list[str]] = {domain: [] for domain in source.take}
        for member, data in sorted(members(path, source.inner, [*_globs(source)])):
            if any(fnmatch.fnmatchcase(member, glob) for glob in source.skip):
                continue
            documents = read_documents(source.form, data)
            for domain, globs in source.take.items():
                if any(fnmatch.fnmatchcase(member, glob) for glob in globs):
                    taken[domain] += documents
        for domain, documents in taken.items():
            if not documents:
                raise BadFileError(
                    f"{path.name} has no document for {domain}", "Correct its globs and form."
                )
            is_page = source.form == "page"
            found.setdefault(domain, []).extend(
                drop_navigation(documents) if is_page else documents
            )
    return found


def members(path: Path, inner: str, globs: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the files of a package, or of an archive inside it.

    Raises:
      BadFileError: The package is damaged.
      UsageError: dpkg-deb is not installed.
    """
    wanted = [inner] if inner else globs
    if path.suffix == ".deb":
        if shutil.which("dpkg-deb") is None:
            raise UsageError("dpkg-deb is not installed", "Install dpkg.")
        done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True)
        if done.returncode:
            raise BadFileError(f"cannot unpack {path}", "Delete it, to fetch it anew.")
        data = done.stdout
    else:
        data = path.read_bytes()
    try:
        for name, content in _untar(data, wanted):
            yield from _untar(content, globs) if inner else [(name, content)]
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise BadFileError(
            f"cannot unpack {path}: {error}", "Delete it, to fetch it anew."
        ) from None


def version(source: Source, path: Path) -> str:
    """The version of a fetched package."""
    return source.version or unquote(path.stem.split("_")[1])


def _untar(data: bytes, globs: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isfile() and any(fnmatch.fnmatchcase(name, glob) for glob in globs):
                file = archive.extractfile(member)
                if file is not None:
                    yield name, file.read()


def _globs(source: Source) -> Iterator[str]:
    for globs in source.take.values():
        yield from globs


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
