"""Released checkpoints: what --teacher and scripts/download_teacher.sh call them, their files, where they are. No torch."""
from typing import NamedTuple

EDSR_SITE = "https://cv.snu.ac.kr/research/EDSR/models/"
SWINIR_SITE = "https://github.com/JingyunLiang/SwinIR/releases/download/v0.0/"
TORCH_SITE = "https://download.pytorch.org/models/"
FAKD_PAGE = "github.com/Vincent-Hoo/Knowledge-Distillation-for-Super-resolution"


class Release(NamedTuple):
    """One published file. `where` is the https:// folder that it can be fetched from, or the page that leads to it."""
    name: str
    scales: tuple
    file: str
    where: str

    @property
    def title(self):
        """What the download calls it: EDSR_x2, and without a scale what holds several or none."""
        return f"{self.name}_x{self.scales[0]}" if len(self.scales) == 1 else self.name


def each_scale(name, file, where, scales=(2, 3, 4)):
    return [Release(name, (scale,), file.format(scale=scale), where) for scale in scales]


TEACHERS = [
    Release("EDSR", (2,), "edsr_x2-0edfb8a3.pt", EDSR_SITE),
    Release("EDSR", (3,), "edsr_x3-ea3ef2c6.pt", EDSR_SITE),
    Release("EDSR", (4,), "edsr_x4-4f62e9ef.pt", EDSR_SITE),
    Release("EDSR", (8,), "EDSR_BIX8.pt", FAKD_PAGE),
    Release("EDSR_baseline", (2,), "edsr_baseline_x2-1bc95232.pt", EDSR_SITE),
    Release("EDSR_baseline", (3,), "edsr_baseline_x3-abf2a44e.pt", EDSR_SITE),
    Release("EDSR_baseline", (4,), "edsr_baseline_x4-6b446fab.pt", EDSR_SITE),
    Release("EDSR_BasicSR", (2,), "EDSR_Lx2_f256b32_DIV2K_official-be38e77d.pth", "github.com/XPixelGroup/BasicSR"),
    Release("EDSR_BasicSR", (3,), "EDSR_Lx3_f256b32_DIV2K_official-3660f70d.pth", "github.com/XPixelGroup/BasicSR"),
    Release("EDSR_BasicSR", (4,), "EDSR_Lx4_f256b32_DIV2K_official-76ee1c8f.pth", "github.com/XPixelGroup/BasicSR"),
    *each_scale("EDSR_CSD", "CSD_EDSR_x{scale}.pth", "github.com/Booooooooooo/CSD"),
    *each_scale("RCAN", "RCAN_BIX{scale}.pt", "github.com/yulunzhang/RCAN", (2, 3, 4, 8)),
    *each_scale("RCAN_FAKD", "FAKD_RCAN_x{scale}.pt", FAKD_PAGE, (4,)),
    *each_scale("SAN", "SAN_BIX{scale}.pt", "github.com/daitao/SAN", (2, 3, 4, 8)),
    *each_scale("SwinIR", "001_classicalSR_DIV2K_s48w8_SwinIR-M_x{scale}.pth", SWINIR_SITE),
    *each_scale("SwinIR_light", "002_lightweightSR_DIV2K_s64w8_SwinIR-S_x{scale}.pth", SWINIR_SITE, (2,)),
    Release("CARN", (2, 3, 4), "carn.pth", "github.com/nmhkahn/CARN-pytorch"),
    Release("CARN_M", (2, 3, 4), "carn_m.pth", "github.com/nmhkahn/CARN-pytorch"),
    *each_scale("RDN", "rdn_x{scale}.pt", "github.com/sanghyun-son/EDSR-PyTorch"),
    *each_scale("IMDN", "IMDN_x{scale}.pth", "github.com/Zheng222/IMDN"),
]
LOSS_NETWORKS = [  # networks that terms of the loss look at images with
    Release("vgg19", (), "vgg19-dcbb9e9d.pth", TORCH_SITE),
    Release("vqgan_f16_1024", (), "vqgan_f16_1024.ckpt", "heibox.uni-heidelberg.de/d/8088892a516d4e3baf92/"),
]
RELEASED = {release.title: release for release in TEACHERS + LOSS_NETWORKS}

# other files that a teacher may be in: FAKD's and BasicSR's, and the small one that was trained here
ALSO = {
    "EDSR": ("EDSR_BIX{scale}.pt", "EDSR_Lx{scale}_f256b32_DIV2K_official-*.pth"),
    "RCAN": ("RCAN_compact_x{scale}.pt",),
    "SAN": ("SAN_BI{scale}X.pt",),
}


def files_of(name, scale):
    """Names, as glob patterns, of the files that hold the teacher for a scale, in the order in which to look for them."""
    files = [release.file for release in TEACHERS if release.name == name and scale in release.scales]
    return files + [pattern.format(scale=scale) for pattern in ALSO.get(name, ())]
