"""Finding the checkpoint of a teacher by its name."""
import os
from pathlib import Path

from model.loading import CheckpointError
from option import ROOT
from released import TEACHERS, files_of

FOLDER = ROOT / "teacher_checkpoint"


def teacher_path(name: str, scale: int, flag: str = "--teacher") -> str | Path:
    """Return the checkpoint file of a teacher, given the file itself or the name of a released network.

    Raises CheckpointError, which mentions the flag, where the name is unknown or its checkpoint is missing.
    """
    is_file = os.path.exists(name) or os.sep in name or "." in name
    return name if is_file else find_teacher(name, scale, flag)


def find_teacher(name: str, scale: int, flag: str = "--teacher") -> Path:
    """Find a released checkpoint in teacher_checkpoint/ by name and scale, or else a small teacher of this project.

    Raises CheckpointError, which lists the file names that were searched for.
    """
    names = dict.fromkeys(release.name for release in TEACHERS)
    if name not in names:
        raise CheckpointError(f"{flag} {name}: neither a file nor one of {', '.join(names)}")
    patterns = files_of(name, scale)
    for pattern in patterns:
        found = sorted(FOLDER.glob(pattern))
        if found:
            return found[0]
    releases = [release for release in TEACHERS if release.name == name]
    released = next((release for release in releases if scale in release.scales), None)
    if not released:
        scales = ", ".join(f"x{scale}" for release in releases for scale in release.scales)
        raise CheckpointError(f"no {name} teacher for scale {scale}: it was released for {scales}"
                              + (f", and {FOLDER} holds no {' or '.join(patterns)}" if patterns else "")
                              + f"; give a checkpoint file with {flag} FILE")
    raise CheckpointError(f"no {name} teacher for scale {scale}: looked in {FOLDER} for {', '.join(patterns)}; bash "
                          f"scripts/download_teacher.sh {released.title} downloads it or prints where to find it, or give a "
                          f"checkpoint file with {flag} FILE")
