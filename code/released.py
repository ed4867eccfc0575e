"""Released checkpoints: names for --teacher and scripts/download_teacher.sh, file names, and addresses.

This file does not import torch, so that --help is instant.
"""
from typing import NamedTuple

EDSR_SITE = "https://cv.snu.ac.kr/research/EDSR/models/"
SWINIR_SITE = "https://github.com/JingyunLiang/SwinIR/releases/download/v0.0/"
REALESRGAN_SITE = "https://github.com/xinntao/Real-ESRGAN/releases/download/v0.2.5.0/"
RESTORMER_SITE = "https://github.com/swz30/Restormer/releases/download/v1.0/"
TORCH_SITE = "https://download.pytorch.org/models/"
FAKD_PAGE = "github.com/Vincent-Hoo/Knowledge-Distillation-for-Super-resolution"


class Release(NamedTuple):
    """A published file; `site`: the https:// folder that it can be downloaded from, or else the page that links to it."""

    name: str
    scales: tuple
    file: str
    site: str

    @property
    def title(self) -> str:
        """Return the name for scripts/download_teacher.sh, with the scale (EDSR_x2) if it is of a single one."""
        return f"{self.name}_x{self.scales[0]}" if len(self.scales) == 1 else self.name


def each_scale(name: str, file: str, site: str, scales: tuple = (2, 3, 4)) -> list[Release]:
    """Return a Release for each scale; `file` contains {scale}."""
    return [Release(name, (scale,), file.format(scale=scale), site) for scale in scales]


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
    *each_scale("SPAN", "spanx{scale}_ch52.pth", "github.com/hongyuanyu/SPAN", (2, 4)),
    *each_scale("SPAN_S", "spanx{scale}_ch48.pth", "github.com/hongyuanyu/SPAN", (2, 4)),
    Release("Compact", (4,), "realesr-general-x4v3.pth", REALESRGAN_SITE),  # for degraded photos, not for bicubic LR images
    Release("Compact_anime", (4,), "realesr-animevideov3.pth", REALESRGAN_SITE),
    Release("NAFNet_GoPro", (1,), "NAFNet-GoPro-width32.pth", "github.com/megvii-research/NAFNet"),
    Release("Restormer_deblur", (1,), "motion_deblurring.pth", RESTORMER_SITE),
    Release("Restormer_derain", (1,), "deraining.pth", RESTORMER_SITE),
]
LOSS_NETWORKS = [  # fixed feature extractors of loss terms: VGG and CSD, DCR and DMM
    Release("vgg19", (), "vgg19-dcbb9e9d.pth", TORCH_SITE),
    Release("vqgan_f16_1024", (), "vqgan_f16_1024.ckpt", "heibox.uni-heidelberg.de/d/8088892a516d4e3baf92/"),
]
RELEASED = {release.title: release for release in TEACHERS + LOSS_NETWORKS}

# Other file names of teachers: those of FAKD and BasicSR, and of the small teachers trained in this project.
OTHER_FILES = {
    "EDSR": ("EDSR_BIX{scale}.pt", "EDSR_Lx{scale}_f256b32_DIV2K_official-*.pth"),
    "RCAN": ("RCAN_compact_x{scale}.pt",),
    "SAN": ("SAN_BI{scale}X.pt",),
}


def files_of(name: str, scale: int) -> list[str]:
    """Return glob patterns of the file names of a teacher of that scale, in the order of preference."""
    files = [release.file for release in TEACHERS if release.name == name and scale in release.scales]
    return files + [pattern.format(scale=scale) for pattern in OTHER_FILES.get(name, ())]
