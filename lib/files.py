"""How files are hashed, written, fetched and unpacked, so that nothing is half there and nothing foreign gets in."""

import errno
import hashlib
import os
import shutil
import stat
import sys
import tarfile
import uuid
import zipfile
import zlib
from pathlib import Path, PurePosixPath


class DataError(ValueError):
    """Something in a dataset or a file is not as it should be: one sentence that says what to do."""


def sha256_file(path: str | Path) -> str:
    """Hash a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Write a file so that a reader sees either the old content or the whole new one, and never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(draft, path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        raise full_disk(error, path) or error from None


def full_disk(error: BaseException, path: Path) -> OSError | None:
    """Return a full disk's error in one sentence that names the file, or None for any other error."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return OSError(
            errno.ENOSPC,
            f"No space left on the disk while writing {path}: free some and run again; nothing was left half-written",
        )
    return None


def fetch(url: str, sha256: str, folder: str | Path) -> Path:
    """Download a file unless it is there already, and accept it only with the right checksum."""
    import pooch

    name = PurePosixPath(url.split("?")[0]).name
    try:
        # To a place of its own first: a file that fails the check is never seen under its real name.
        return Path(pooch.retrieve(url, f"sha256:{sha256}", name, folder, progressbar=sys.stderr.isatty()))
    except ValueError as error:
        raise DataError(
            f"The file downloaded from {url} does not have the sha256 {sha256}, so it was thrown away: "
            "try again, and if it persists the publisher has changed the file."
        ) from error
    except OSError as error:
        if full := full_disk(error, Path(folder) / name):
            raise full from error
        raise DataError(
            f"{url} could not be downloaded ({type(error).__name__}): check the network, "
            "or download it by hand and give the script --archive PATH."
        ) from error


def extract(archive: str | Path, folder: str | Path) -> Path:
    """Unpack a zip or tar archive into a new folder; refuses links and entries that would land outside."""
    archive, folder = Path(archive), Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists already: remove it, or unpack {archive.name} somewhere else.")
    if not archive.is_file():
        raise DataError(f"Archive {archive} does not exist: check the path.")
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as z:
                for info in z.infolist():
                    linked = stat.S_ISLNK(info.external_attr >> 16)
                    # orig_filename: the zip module has already cut and turned the name that it shows.
                    _check_member(archive, info.orig_filename, allowed=not linked)
                z.extractall(draft)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as t:
                for member in t.getmembers():
                    _check_member(archive, member.name, allowed=member.isfile() or member.isdir())
                # The members were all checked above; Python before 3.11.4 has no filter to check them again.
                t.extractall(draft, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        else:
            raise DataError(f"{archive} is neither a zip nor a tar archive, or is cut short: get it again.")
        os.replace(draft, folder)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{archive} is damaged ({error}): get it again.") from error
    except OSError as error:
        raise full_disk(error, folder) or error from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _check_member(archive: Path, name: str, allowed: bool) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in (parts.parts or ("",))[0]:
        raise DataError(
            f"{archive} holds the entry '{name}', which would land outside the folder it is unpacked into: "
            "nothing was unpacked; get the archive from its publisher."
        )
    if not allowed:
        raise DataError(
            f"{archive} holds '{name}', which is a link or a device and not a plain file: "
            "nothing was unpacked; get the archive from its publisher."
        )
