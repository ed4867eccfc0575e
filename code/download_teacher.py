"""Download released checkpoints and check that they load; run by scripts/download_teacher.sh."""
import argparse
import hashlib
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from option import ROOT, Parser
from option_types import home_path
from released import LOSS_NETWORKS, RELEASED, Release
from system import errors
from system.errors import UserError, writing
from system.signals import run_script

log = logging.getLogger(__name__)
VARIABLE = "TEACHER_URL"


def provide(release: Release, folder: Path) -> str:
    """Download a file unless `folder` holds it, and return its path with a description of the network in it.

    The file is renamed to its final name only after it has been loaded. Raises UserError, also for a file that is linked
    from a page, and CalledProcessError where fetch.sh has failed and printed why.
    """
    target = folder / release.file
    if target.is_file():
        return f"{target}: {check(release, target)}"
    site = os.environ.get(VARIABLE) or release.site
    if not site.startswith(("http://", "https://")):
        raise UserError(f"{release.title}: cannot be downloaded directly; follow the links on {site}, save it as {target}")
    url, part = f"{site.rstrip('/')}/{release.file}", folder / f"{release.file}.part"
    log.info("%s: downloading %s", release.title, url)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["bash", ROOT / "scripts" / "fetch.sh", url, part, VARIABLE], check=True)
    try:
        digits = re.search(r"-([0-9a-f]{8})\.pth?$", release.file)  # torch.hub's convention: the first digits of the sha256
        if digits and not hashlib.sha256(part.read_bytes()).hexdigest().startswith(digits[1]):
            raise UserError(f"the sha256 does not begin with {digits[1]}")
        contents = check(release, part)
    except UserError as problem:
        part.unlink()
        raise UserError(f"{url} is not {release.title}: {problem}; the download is deleted") from None
    with writing(target):
        part.replace(target)
    return f"{target}: {contents}"


def check(release: Release, path: Path) -> str:
    """Describe the network in the file; raises CheckpointError where it is another one or of another scale."""
    from model import load_model  # noqa: PLC0415 - --help and the list of names should not wait for torch
    from model.loading import CheckpointError, read_checkpoint  # noqa: PLC0415

    if release in LOSS_NETWORKS:
        if release.name == "vgg19" and "features.0.weight" not in read_checkpoint(path)[1]:
            raise CheckpointError(f"{path}: holds no features.0.weight")
        return release.name
    net = load_model(path, scale=release.scales[0])
    scales = ", ".join(f"x{scale}" for scale in release.scales)
    return f"{type(net).__name__} {scales}, {sum(p.numel() for p in net.parameters()):,} parameters"


def listing() -> str:
    """Format the table of names, files and addresses."""
    rows = [(release.title, release.file, release.site) for release in RELEASED.values()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {title:<{widths[0]}}  {file:<{widths[1]}}  {site}" for title, file, site in rows)


def main() -> int:
    """Download the checkpoints named on the command line, or list all names; return the exit status."""
    parser = Parser(prog="bash scripts/download_teacher.sh", formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False,
                    description="Downloads released checkpoints, checks that they load, and puts them where --teacher finds "
                                "them.\nFor a file that a page links to, prints the page and the file name to save it as.",
                    epilog=f"environment variable {VARIABLE}: address of another folder to download all files from\n\n"
                           f"names, files, and addresses (https://: folders; others: pages with links):\n{listing()}")
    parser.add_argument("names", nargs="*", metavar="NAME", help="checkpoints to download (default: none, list the names)")
    parser.add_argument("--dir", metavar="FOLDER", default=ROOT / "teacher_checkpoint", type=home_path,
                        help="folder for the checkpoints (default: %(default)s)")
    args = parser.parse_intermixed_args()
    for name in args.names:
        if name not in RELEASED:
            near = [title for title in RELEASED if title.startswith(f"{name}_x")] or list(RELEASED)
            parser.error(f"there is no checkpoint {name}; choose {' or '.join(near)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if not args.names:
        log.info("%s", listing())
    status = 0
    for name in dict.fromkeys(args.names):
        try:
            log.info("%s", provide(RELEASED[name], args.dir))
        except UserError as problem:
            status = errors.fail(problem)
        except subprocess.CalledProcessError:
            status = 2
    return status


if __name__ == "__main__":
    run_script(main)
