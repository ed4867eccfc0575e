"""Entry of scripts/download_teacher.sh: fetches released checkpoints and checks that they load."""
import argparse
import logging
import os
import re
import sys

from download import fetch, writing
from option import ROOT, Parser, home_path
from released import LOSS_NETWORKS, RELEASED
from system import errors
from system.errors import UserError

log = logging.getLogger(__name__)
VARIABLE = "TEACHER_URL"


def provide(release, folder):
    """Fetches a file that `folder` does not hold, and checks it; returns a line that says what is where.

    The file appears under its own name only after it has loaded. Raises UserError, for one that is behind a page too.
    """
    target = folder / release.file
    if target.is_file():
        return f"{target}: {check(release, target)}"
    site = os.environ.get(VARIABLE) or release.where
    if not site.startswith(("http://", "https://")):
        raise UserError(f"{release.title}: no plain address is known; get it from the links on {site}, save it as {target}")
    url = f"{site.rstrip('/')}/{release.file}"
    log.info("%s: fetching %s", release.title, url)
    digits = re.search(r"-([0-9a-f]{8})\.pth?$", release.file)  # torch hub's way: the beginning of the sha256
    unchecked = target.with_name(f"{target.name}.unchecked")
    fetch(url, unchecked, digits and digits[1], hint=f"{VARIABLE} can name the address of another folder")
    try:
        holds = check(release, unchecked)
    except UserError as problem:
        unchecked.unlink()
        raise UserError(f"{url} is not {release.title}: {problem}; it is deleted") from None
    with writing(target):
        os.replace(unchecked, target)
    return f"{target}: {holds}"


def check(release, path):
    """What is in the file, in words; raises CheckpointError where that is not the network, or not for that scale."""
    from model import load_model  # noqa: PLC0415 - --help and the list of names should not wait for torch
    from model.loading import CheckpointError, read_checkpoint  # noqa: PLC0415

    if release in LOSS_NETWORKS:
        if release.name == "vgg19" and "features.0.weight" not in read_checkpoint(path)[1]:
            raise CheckpointError(f"{path}: holds no features.0.weight")
        return release.name
    net = load_model(path, scale=release.scales[0])
    scales = ", ".join(f"x{scale}" for scale in release.scales)
    return f"{type(net).__name__} {scales}, {sum(p.numel() for p in net.parameters()):,} parameters"


def listing():
    rows = [(release.title, release.file, release.where) for release in RELEASED.values()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {title:<{widths[0]}}  {file:<{widths[1]}}  {where}" for title, file, where in rows)


def make_parser():
    parser = Parser(prog="bash scripts/download_teacher.sh", formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False,
                    description="Fetches released checkpoints, checks that they load, and puts them where --teacher finds "
                                "them.\nFor those behind a page it says which one, and the name to save the file as.",
                    epilog=f"environment variable {VARIABLE}: address of a folder to fetch all files from instead\n\n"
                           f"names, files, and where they are published (https://: fetched from there):\n{listing()}")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch; without any, the names are listed")
    parser.add_argument("--dir", metavar="FOLDER", default=ROOT / "teacher_checkpoint", type=home_path,
                        help="where to put it (default: %(default)s)")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    for name in args.names:
        if name not in RELEASED:
            near = [title for title in RELEASED if title.startswith(f"{name}_x")]
            parser.error(f"there is no checkpoint {name}: " + (f"say which, {' or '.join(near)}" if near else
                                                               f"there are {', '.join(RELEASED)}"))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if not args.names:
        log.info("%s", listing())
    status = 0
    for name in dict.fromkeys(args.names):
        try:
            log.info("%s", provide(RELEASED[name], args.dir))
        except UserError as problem:
            status = errors.fail(problem)
    return status


if __name__ == "__main__":
    errors.run(main)
