"""Entry of scripts/download_data.sh: fetches DIV2K and the benchmark images. `fetch` and `unpack` are for any file."""
import argparse
import contextlib
import gzip
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from urllib.parse import urlsplit

from option import ROOT, Parser, home_path
from system import errors
from system.errors import UserError

try:
    from tqdm import tqdm
except ImportError:  # data can be fetched before anything is installed
    tqdm = None

log = logging.getLogger(__name__)

URLS = {"DIV2K": "https://cv.snu.ac.kr/research/EDSR/DIV2K.tar",
        "benchmark": "https://cv.snu.ac.kr/research/EDSR/benchmark.tar"}
# Dataset: its (HR folder, LR folder), under DATA_ROOT.
FOLDERS = {"DIV2K": [("DIV2K/DIV2K_train_HR", "DIV2K/DIV2K_train_LR_bicubic")],
           "benchmark": [(f"benchmark/{name}/HR", f"benchmark/{name}/LR_bicubic")
                         for name in ("Set5", "Set14", "B100", "Urban100")]}
TRIES = 4  # without a byte gained
TIMEOUT = 30  # seconds without an answer
CHUNK = 1 << 16  # bytes
TAR_BLOCK = 512  # bytes
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError,
          UnicodeDecodeError)


class Dropped(Exception):
    """The connection failed in a way that another try may mend."""


# Fetching

def fetch(url, target, sha256=None, hint="", pause=1.0):
    """Downloads `url` to the file `target` and returns its path; `target` appears whole and checked, or not at all.

    What has arrived lies in `target`.part, and a later call goes on from there if the server still holds the same file
    (its ETag or date). A `target` that is there already is checked and kept, without asking the server.

    sha256: 64 hex digits, or the first few, as in the file names of torch hub.
    hint: what to do where the address does not answer; it ends the message.
    pause: seconds before the second try; each further pause is twice the last.
    Raises UserError: no such file, no network, no space, another checksum.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{6,64}", sha256):
        raise ValueError(f"{sha256!r} is not 6 to 64 hex digits of a sha256")
    check_address(url, hint)
    target = Path(target)
    part, about = beside(target, ".part"), beside(target, ".about.part")
    if target.is_file():
        check_sha256(target, sha256, "move it away to fetch it anew")
        return target
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    receive_persistently(url, part, about, hint, pause)
    try:
        check_sha256(part, sha256, f"what {url} sent is deleted: run again, or compare the address with the checksum")
    except UserError:
        discard(part, about)
        raise
    with writing(target):
        flush(part)
        os.replace(part, target)
        about.unlink(missing_ok=True)
    return target


def check_address(url, hint):
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or re.search(r"[\s\x00-\x1f\x7f]", url) or not url.isascii():
        raise UserError(with_hint(f"{url!r} is not an address such as https://host/file", hint))


def receive_persistently(url, part, about, hint, pause):
    reached, failures = size_of(part), 0
    while True:
        try:
            return receive(url, part, about, hint)
        except Dropped as dropped:
            gained = size_of(part) > reached
            reached = max(reached, size_of(part))
            failures = 1 if gained else failures + 1
            if failures == TRIES:
                kept = f"; {megabytes(size_of(part))} are kept, run again to go on from there" if size_of(part) else ""
                raise UserError(with_hint(f"{url}: {dropped}, {TRIES} times in a row{kept}", hint)) from None
            seconds = pause * 2 ** (failures - 1)
            log.info("%s: %s; trying again in %g s", url, dropped, seconds)
            time.sleep(seconds)


def receive(url, part, about, hint):
    """One request that completes `part`; raises Dropped or UserError."""
    known = read_about(about)
    validator = known.get("etag") or known.get("modified")
    have = size_of(part)
    if known.get("url") != url or not validator:
        have = 0  # nothing tells that the server still holds the same file
    headers = {"User-Agent": "download.py"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    response = ask(urllib.request.Request(url, headers=headers), hint)
    with response:
        start, total = extent(response)
        if start:
            total = total or known.get("total")
            if start != have or changed(response, known, total):
                discard(part, about)
                raise Dropped("what had arrived is not from the file that the server holds now")
        if response.status == 416:
            return
        if start == 0:
            begin(url, response, total, part, about)
        copy(response, part, start, total)


def ask(request, hint):
    """The server's answer, with status 200, 206 or 416."""
    # Only these handlers: the usual ones would follow a redirection to ftp.
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
                    urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler,
                    urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler):
        opener.add_handler(handler())
    try:
        return opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as answer:
        if answer.code == 416 and request.has_header("Range"):
            return answer
        answer.close()
        problem = f"the server answers {answer.code} ({describe(answer.reason)})"
        if answer.code in (408, 425, 429) or answer.code >= 500:
            raise Dropped(problem) from None
        raise UserError(with_hint(f"{request.full_url}: {problem}", hint)) from None
    except http.client.InvalidURL as invalid:
        raise UserError(with_hint(f"{request.full_url}: {invalid}", hint)) from None
    except (OSError, http.client.HTTPException) as failure:
        reason = getattr(failure, "reason", failure)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UserError(with_hint(f"{request.full_url}: its certificate is not valid, {reason.verify_message}",
                                      hint)) from None
        raise Dropped(f"no connection ({describe(reason)})") from None


def extent(response):
    """(first byte, bytes of the whole file or None) of the body that follows; a 416 starts where the file ends."""
    header = response.headers.get("Content-Range") or ""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header.strip())
        if not match:
            return -1, None
        return int(match[1]), None if match[2] == "*" else int(match[2])
    if response.status == 416:
        match = re.fullmatch(r"bytes \*/(\d+)", header.strip())
        return (int(match[1]), int(match[1])) if match else (-1, None)
    length = response.headers.get("Content-Length") or ""
    return 0, int(length) if length.isdecimal() else None


def changed(response, known, total):
    """Whether the server holds another file than the half here; some honour Range and ignore If-Range."""
    now = validators(response) | {"total": total}
    return any(now[name] and known.get(name) and now[name] != known[name] for name in now)


def validators(response):
    etag = response.headers.get("ETag")
    return {"etag": None if etag and etag.startswith("W/") else etag,  # If-Range takes no weak ones
            "modified": response.headers.get("Last-Modified")}


def begin(url, response, total, part, about):
    """Empties `part`, and only then notes what it will hold: a note must never stand beside another file's half."""
    with writing(part):
        part.write_bytes(b"")
        about.write_text(json.dumps({"url": url, "total": total} | validators(response)))


def copy(response, part, have, total):
    """Appends the body to `part`, which holds `have` of `total` bytes."""
    need, free = (total or have) - have, shutil.disk_usage(part.parent).free
    if need > free:
        raise UserError(f"{part.parent}: {megabytes(need)} to fetch, {megabytes(free)} free: make space, then run again")
    # Ctrl-C and dropped connections leave what has arrived.
    with writing(part), open(part, "ab") as file, progress(desc=part.stem, initial=have, total=total) as bar:
        while chunk := read(response):
            file.write(chunk)
            bar.update(len(chunk))
    size = size_of(part)
    if total is not None and size > total:
        part.unlink()
        raise Dropped(f"{size} bytes came, where {total} were announced")
    if total is not None and size < total:
        raise Dropped(f"the connection broke after {size} of {total} bytes")


def read(response):
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as failure:
        raise Dropped(f"the connection broke ({describe(failure)})") from None


def read_about(about):
    try:
        known = json.loads(about.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def check_sha256(path, expected, remedy):
    if expected is None:
        return
    with writing(path), open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if not digest.hexdigest().startswith(expected.lower()):
        raise UserError(f"{path}: its sha256 is {digest.hexdigest()}, not {expected}; {remedy}")


def flush(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def discard(*paths):
    for path in paths:
        path.unlink(missing_ok=True)


# Unpacking

def unpack(archive, folder, check=None):
    """Unpacks a tar, tar.gz or zip into `folder`; what is in it appears there only after all of it is unpacked.

    check: called with the folder that everything is unpacked in, before it is put in place; may raise UserError.
    Existing folders are added to, existing files of the same name replaced.
    Raises UserError: a damaged archive (it is deleted), members that have no place in `folder`, no space.
    """
    archive, folder = Path(archive), Path(folder)
    staging = staging_of(archive, folder)
    try:
        with writing(folder):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            extract(archive, staging)
        if check:
            check(staging)
    except BaseException as failure:
        shutil.rmtree(staging, ignore_errors=True)
        if not isinstance(failure, DAMAGE):
            raise
        archive.unlink()
        raise UserError(f"{archive} is damaged or no archive ({describe(failure)}); it is deleted: run again to fetch it "
                        "anew") from None
    with writing(folder):
        move(staging, folder)
    shutil.rmtree(staging)


def staging_of(archive, folder):
    """The folder that is there while `archive` is being unpacked or put in place, and after that was cut short."""
    return Path(folder) / f"{Path(archive).name}.unpacking"


def extract(archive, staging):
    with open(archive, "rb") as file:
        magic = file.read(2)
    if magic == b"PK":
        with zipfile.ZipFile(archive) as opened:
            extract_zip(opened, archive, staging)
    else:
        with tarfile.open(archive, "r:gz" if magic == b"\x1f\x8b" else "r:") as opened:
            extract_tar(opened, archive, staging)


def extract_zip(opened, archive, staging):
    members = opened.infolist()
    for member in members:
        check_member(archive, member.filename)
        if member.flag_bits & 1:
            raise UserError(f"{archive}: {member.filename} is encrypted, unpack it by hand")
    check_space(staging, sum(member.file_size for member in members))
    with progress(desc=archive.name, total=len(members), unit=" files") as bar:
        for member in members:
            opened.extract(member, staging)
            bar.update(1)


def extract_tar(opened, archive, staging):
    members = opened.getmembers()
    check_end(opened)
    for member in members:
        check_member(archive, member.name)
        if not (member.isfile() or member.isdir()):
            raise UserError(f"{archive}: {member.name} is a link or a device, images need none: nothing is unpacked")
    check_space(staging, sum(member.size for member in members))
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with progress(desc=archive.name, total=len(members), unit=" files") as bar:
        opened.extractall(staging, members=counted(members, bar), **safely)


def check_end(opened):
    """tarfile takes a broken header for the end; the real end is a block of zeros, and a sound checksum in gzip."""
    opened.fileobj.seek(opened.offset)
    if opened.fileobj.read(TAR_BLOCK) != bytes(TAR_BLOCK):
        raise tarfile.ReadError("it breaks off")
    while opened.fileobj.read(CHUNK):
        pass


def check_member(archive, name):
    path = PureWindowsPath(name)  # it knows / and \ and drives
    if path.anchor or ".." in path.parts:
        raise UserError(f"{archive}: {name} would be written outside of the folder, nothing is unpacked; "
                        "delete the archive if it is not yours")


def check_space(folder, need):
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"{folder.parent}: {megabytes(need)} to unpack, {megabytes(free)} free: make space, then run again")


def move(source, folder):
    """Moves what is in `source` into `folder`; a folder that is not there yet appears in one step."""
    for entry in sorted(source.iterdir()):
        target = folder / entry.name
        if entry.is_dir() and target.is_dir():
            move(entry, target)
        elif target.exists() and (entry.is_dir() or target.is_dir()):
            raise UserError(f"{target} is in the way: move it, then run again")
        else:
            shutil.move(entry, target)  # no os.replace: `folder` may be a link to another disk


# Datasets

def survey(name, root):
    """One line on each set of the dataset `name` under `root`; raises UserError where images lack.

    LR folders may be missing, the loader makes LR images itself; one that is there must hold as many images as HR does.
    """
    lines = []
    for hr, lr in FOLDERS[name]:
        count = images(root / hr)
        if not count:
            raise UserError(f"{root / hr} holds no PNG images")
        scales = sorted(path for path in (root / lr).glob("X*") if path.is_dir())
        for folder in scales:
            if images(folder) != count:
                raise UserError(f"{folder} holds {images(folder)} PNG images, {root / hr} {count}")
        names = " ".join(path.name for path in scales)
        lines.append(f"{root / hr}: {count} images; " + (f"LR: {names} in {root / lr}" if names else "no LR"))
    return lines


def images(folder):
    return sum(not path.name.startswith(".") for path in folder.glob("*.png"))


def provide(name, root, keep):
    """Fetches and unpacks the dataset `name` unless `root` holds it; returns lines that say what is where."""
    variable = f"{name.upper()}_URL"
    url = os.environ.get(variable) or URLS[name]
    ending = next((end for end in (".tar.gz", ".tgz", ".zip") if urlsplit(url).path.endswith(end)), ".tar")
    archive = root / f"{name}{ending}"
    if not staging_of(archive, root).exists():
        with contextlib.suppress(UserError):
            return survey(name, root)

    log.info("%s: fetching %s", name, url)
    fetch(url, archive, hint=f"{variable} can name another address")
    log.info("%s: unpacking %s", name, archive)

    def check(folder):
        try:
            survey(name, folder)
        except UserError as problem:
            what = str(problem).replace(f"{folder}{os.sep}", "")  # that folder is gone when this is read
            raise UserError(f"{archive} is not the dataset {name}: {what}; delete it to fetch it anew") from None
    unpack(archive, root, check)
    try:
        lines = survey(name, root)
    except UserError as problem:
        raise UserError(f"{problem}; move {root / name} away, then run again") from None
    if not keep:
        archive.unlink()
    return lines


def make_parser():
    addresses = "\n".join(f"  {name.upper()}_URL (default {url})" for name, url in URLS.items())
    parser = Parser(prog="bash scripts/download_data.sh", formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False,
                    description="Fetches DIV2K (7 GB) and the benchmark images Set5, Set14, B100, Urban100. Run it again "
                                "to go on after an interruption;\ndata and archives that are there are not fetched again.",
                    epilog=f"environment variables, addresses of a tar, tar.gz or zip:\n{addresses}\n\n"
                           "it makes:\n  DATA_ROOT/DIV2K/DIV2K_train_HR/*.png, DATA_ROOT/DIV2K/DIV2K_train_LR_bicubic/X2/..."
                           "\n  DATA_ROOT/benchmark/Set5/HR/*.png, DATA_ROOT/benchmark/Set5/LR_bicubic/X2/...")
    parser.add_argument("names", nargs="*", metavar="DATASET", help="DIV2K, benchmark (default: both)")
    parser.add_argument("--dir_data", metavar="DATA_ROOT", default=ROOT / "dataset", type=home_path,
                        help="folder that holds the datasets (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the archives after unpacking")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    for name in args.names:
        if name not in URLS:
            parser.error(f"there is no dataset {name}: there are {', '.join(URLS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for name in dict.fromkeys(args.names or URLS):
        for line in provide(name, args.dir_data, args.keep):
            log.info("%s", line)


# Small things

@contextlib.contextmanager
def writing(path):
    """Failures of the disk, as one line."""
    try:
        yield
    except OSError as failure:
        if isinstance(failure, DAMAGE):
            raise
        where = failure.filename or path
        raise UserError(f"{where}: {describe(failure)}: make space or check the folder, then run again") from None


def progress(unit="B", **settings):
    """A bar with speed and time left, where there is a terminal to show it."""
    if tqdm is None:
        return contextlib.nullcontext(SimpleNamespace(update=lambda count: None))
    return tqdm(unit=unit, unit_scale=unit == "B", disable=None, **settings)


def counted(members, bar):
    for member in members:
        yield member
        bar.update(1)


def beside(path, ending):
    return path.with_name(path.name + ending)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def megabytes(count):
    return f"{count / 1e6:.1f} MB"


def describe(failure):
    """One line, whatever lines the failure's own text has."""
    return " ".join(str(getattr(failure, "strerror", None) or failure).split()) or type(failure).__name__


def with_hint(message, hint):
    return f"{message}; {hint}" if hint else message


if __name__ == "__main__":
    errors.run(main)
