"""Finding the checkpoint of a teacher by the name of its network."""
from model.loading import CheckpointError
from option import ROOT

FOLDER = ROOT / "teacher_checkpoint"

# network: (file names looked for, in this order; where the first ones are released)
RELEASED = {
    "EDSR": (("edsr_x{scale}-*.pt", "EDSR_BIX{scale}.pt", "EDSR_Lx{scale}_f256b32_DIV2K_official-*.pth"),
             "cv.snu.ac.kr/research/EDSR/models/"),
    "RCAN": (("RCAN_BIX{scale}.pt", "RCAN_compact_x{scale}.pt"), "the page github.com/yulunzhang/RCAN"),
}


def find_teacher(name, scale):
    """Path of the released checkpoint of that network and scale in teacher_checkpoint/, or else of a small one trained here;
    raises CheckpointError with the paths looked at."""
    if name not in RELEASED:
        raise CheckpointError(f"--teacher {name}: neither a file nor one of {', '.join(RELEASED)}")
    patterns, address = RELEASED[name]
    patterns = [pattern.format(scale=scale) for pattern in patterns]
    for pattern in patterns:
        found = sorted(FOLDER.glob(pattern))
        if found:
            return found[0]
    raise CheckpointError(f"no {name} teacher for scale {scale}: looked in {FOLDER} for {', '.join(patterns)}; get the "
                          f"released one from {address}, or name a checkpoint file with --teacher FILE")
