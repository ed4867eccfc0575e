"""Finding the checkpoint of a teacher by its name."""
import os

from option import ROOT
from released import TEACHERS, files_of

from model.loading import CheckpointError

FOLDER = ROOT / "teacher_checkpoint"


def teacher_path(name, scale, flag="--teacher"):
    """Path of a teacher that is said by its name or as a checkpoint file; raises CheckpointError, which names the flag."""
    is_file = os.path.exists(name) or os.sep in name or "." in name
    return name if is_file else find_teacher(name, scale, flag)


def find_teacher(name, scale, flag="--teacher"):
    """Path of the released checkpoint of that name and scale in teacher_checkpoint/, or else of a small one trained here;
    raises CheckpointError with the paths looked at."""
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
                              + f"; name a checkpoint file with {flag} FILE")
    raise CheckpointError(f"no {name} teacher for scale {scale}: looked in {FOLDER} for {', '.join(patterns)}; bash "
                          f"scripts/download_teacher.sh {released.title} fetches it or says where it is, or name a "
                          f"checkpoint file with {flag} FILE")
