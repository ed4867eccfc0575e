"""The flags of train.py, test.py, compare.py, visualize.py, summary.py and export.py.

This module imports no torch, so that --help is instant.
"""
import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NoReturn

import config
import published
from option_types import (
    PAPER_SIZE,
    crop_stages,
    decay_factor,
    expanded,
    fraction,
    kernel,
    natural,
    not_negative,
    order,
    parse_betas,
    parse_decay,
    parse_degradation,
    parse_features,
    parse_list,
    parse_metrics,
    parse_names,
    parse_numbers,
    parse_once,
    parse_output_size,
    parse_pair_dirs,
    parse_point,
    parse_progressive,
    parse_rdn_config,
    parse_scales,
    parse_seconds,
    parse_stages,
    parse_steps,
    parse_view_names,
    parse_views,
    pixel_range,
    positive,
    positive_number,
    probability,
    processes,
    processes_or_none,
    ratio,
    repeats,
    repeats_or_none,
    seed,
    size,
    size_or_none,
    stage_ends,
    window,
)
from template import TEMPLATES

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = "EDSR", "RCAN", "CARN", "CARN_M", "RDN", "IMDN", "Compact", "SPAN", "SAN", "SwinIR", "NAFNet", "Restormer", "RRDB"
EXPORT_FORMATS = "onnx", "safetensors", "torchscript", "ncnn", "spandrel"
PUBLISHED_LOSS_FLAGS = ("alpha", "feature_loss_used", "feature_distilation_type")
EXPONENTS = {  # of the terms that compare images: they grow with this power of the images' range
    **dict.fromkeys(("LC", "T_DS", "TS_masked"), 1),
    **{f"{target}{distance}": {"_MSE": 2, "_PSNR": 0}.get(distance, 1) for target in ("DS", "TS")
       for distance in ("", "_MSE", "_Charbonnier", "_FFT", "_gradient", "_wavelet", "_PSNR")}}
SIZES = {flag for preset in TEMPLATES.values() if "model" in preset for flag in preset}
PATHS = ("dir_data", "dir_demo", "dir_cache", "vgg_path", "vqgan_path", "pre_train", "ckp_dir", "ckp_path", "teacher",
         "output", "int8")


class Parser(argparse.ArgumentParser):
    """Parser that reports a mistake in one line on stderr, suggests the nearest flag, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message, with the nearest flag for an unknown one, and exit."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        near = unknown and difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.7)
        if near:
            message += f"; did you mean {near[0]}?"
        self.exit(2, f"error: {' '.join(message.splitlines())}\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Formatter that leaves out empty defaults."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


def make_parser() -> Parser:
    """Build the parser of the flags that train.py, test.py, compare.py, visualize.py, summary.py and export.py share."""
    parser = Parser(usage="%(prog)s [@FILE] [--FLAG VALUE ...]", allow_abbrev=False, formatter_class=Help,
                    description="Knowledge distillation for super-resolution. train.py trains a student network, test.py "
                                "computes PSNR and SSIM or upscales images, compare.py compares networks, visualize.py "
                                "draws errors and feature affinities, summary.py counts parameters and FLOPs and measures "
                                "time, export.py writes files for other programs. All accept the flags below. @FILE reads "
                                "flags from a file, one per line, such as the config.txt of a run.")
    for add_flags in (_add_device_flags, _add_data_flags, _add_network_flags, _add_loss_flags, _add_view_flags,
                      _add_term_flags, _add_training_flags, _add_experiment_flags, _add_testing_flags,
                      _add_comparison_flags, _add_visualization_flags, _add_summary_flags, _add_export_flags):
        add_flags(parser)
    return parser


def _add_device_flags(parser):
    group = parser.add_argument_group("device")
    group.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    group.add_argument("--gpu_id", type=natural, default=0, help="index of the GPU to use")
    group.add_argument("--n_GPUs", type=processes, default=1,
                       help="number of training processes on this machine, one per GPU (with --cpu: on the CPU), which "
                            "divide each batch among them; for several machines use torchrun")
    group.add_argument("--n_threads", type=processes_or_none, default=2,
                       help="number of data loading processes; 0 loads in the main process")
    group.add_argument("--precision", choices=("single", "half", "bf16"), default="single",
                       help="floating-point format of the forward passes (automatic mixed precision); weights and losses "
                            "remain float32")
    group.add_argument("--teacher_precision", choices=("single", "half", "bf16"),
                       help="the same for networks that are not trained: teachers, and the history model of DCR (default: "
                            "that of --precision)")
    group.add_argument("--feature_precision", choices=("single", "bf16"), default="single",
                       help="floating-point format of VGG-19 and VQGAN, in the terms VGG, CSD, DCR and DMM")
    group.add_argument("--compile", action="store_true",
                       help="compile the networks with torch.compile for training: a later start, then faster iterations, "
                            "mainly on GPUs")
    group.add_argument("--seed", type=seed, default=1,
                       help="random seed of initial weights, data order, crops and augmentation")


def _add_data_flags(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--dir_data", default=str(ROOT / "dataset"), help="folder that contains the datasets")
    group.add_argument("--data_train", type=parse_list, default="DIV2K",
                       help="training sets A+B: DIV2K, Sample (photos that come with scikit-image), or the name of a folder "
                            "with images in DIR_DATA/NAME/HR")
    group.add_argument("--data_test", type=parse_once, default="Set5+Set14+B100+Urban100",
                       help="test sets A+B: DIV2K, Sample, the name of a folder with images in DIR_DATA/benchmark/NAME/HR "
                            "or DIR_DATA/NAME/HR, or Demo (images of --dir_demo, upscaled without ground truth)")
    group.add_argument("--dir_demo", default=str(ROOT / "demo"), help="folder with the images of --data_test Demo")
    group.add_argument("--data_range", default="1-800/801-810",
                       help="first and last DIV2K image for training / for testing")
    group.add_argument("--ext", choices=("sep", "img"), default="sep",
                       help="sep: decode each image file once and keep the pixels in a cache; img: decode it at each use")
    group.add_argument("--dir_cache", default="",
                       help="folder of the cache (default: next to the data, or experiment/cache if that is read-only)")
    group.add_argument("--pair_dirs", type=parse_pair_dirs, default="", metavar="INPUT/TARGET",
                       help="names of the folders of degraded images and of their ground truth, in DIR_DATA/NAME, in its "
                            "subfolders train and test, or in the folders of sequences there, for all datasets but Sample "
                            "and Demo, such as input/target (Rain13K), blur/sharp (GoPro), LR/HR (RealSR); several: A/B+C/D")
    group.add_argument("--scale", type=int, choices=(1, 2, 3, 4, 8), default=4,
                       help="upscaling factor; 1 for restoration at equal size (denoising, deblurring, deraining), where "
                            "LR is the degraded image")
    group.add_argument("--degrade", type=parse_degradation, default="", metavar="KIND",
                       help="degrade the inputs: of training at random, each batch anew, of tests in the same way in every "
                            "run. noise25, noise0-55: Gaussian noise of this standard deviation, or of one uniform in the "
                            "range for each image; jpeg40, jpeg10-40: JPEG of this quality; blur, blur5-15: synthetic "
                            "motion blur along a path of this length in pixels; rain: synthetic rain; sums such as "
                            "blur+noise10+jpeg50-90, in this order, where HR is downscaled before the first noise or JPEG; "
                            "realesrgan: the second-order degradations of Real-ESRGAN, for training with sharpened HR")
    group.add_argument("--patch_size", type=size, default=192, help="side of the training crops in HR pixels")
    group.add_argument("--no_augment", action="store_true", help="disable random flips and transposes of the crops")
    group.add_argument("--rgb_range", type=pixel_range, default=255,
                       help="maximum pixel value in the losses; the published weights of presets are converted to it")


def _add_network_flags(parser):
    group = parser.add_argument_group("networks", "Sizes that are not given are those of the checkpoint, or else those of "
                                                  "the published student.")
    group.add_argument("--template", default="",
                       help="presets A+B, sets of flags that flags on the command line override: " + ", ".join(TEMPLATES))
    group.add_argument("--published", default="", metavar="NAME",
                       help="settings of a published experiment, such as DUKD/EDSR/x3: student, teacher, training and test, "
                            "which --template and flags on the command line override; list prints all with their scores")
    group.add_argument("--model", default="RCAN", help="architecture of the student: " + ", ".join(NETWORKS))
    group.add_argument("--teacher", type=parse_list, default=None,
                       help="teacher: a checkpoint file, or the name of a network in teacher_checkpoint/. With several, "
                            "[A,B], see --teacher_choice (default: the network named by --model)")
    group.add_argument("--teacher_choice", choices=("random", "mean"), default="random",
                       help="with several teachers: draw one at random for each batch, or use the mean of their outputs")
    group.add_argument("--n_resgroups", type=size, help="number of residual groups (RCAN, SAN)")
    group.add_argument("--n_resblocks", type=size,
                       help="number of residual blocks (EDSR), or of residual blocks per group (RCAN, SAN)")
    group.add_argument("--n_feats", type=size,
                       help="number of feature channels (all but RDN): embed_dim of SwinIR, width of NAFNet, dim of "
                            "Restormer")
    group.add_argument("--reduction", type=size, help="channel reduction factor of channel attention (RCAN, SAN)")
    group.add_argument("--res_scale", type=not_negative, help="residual scaling factor (EDSR)")
    group.add_argument("--n_inner", type=size, help="number of channels in the non-local block (SAN)")
    group.add_argument("--n_modules", type=size, help="number of information multi-distillation blocks (IMDN)")
    group.add_argument("--n_convs", type=size, help="number of convolutions between the first and the last (Compact)")
    group.add_argument("--act_type", choices=("prelu", "relu", "leakyrelu"), help="activation function (Compact)")
    group.add_argument("--reparameterise", choices=("none", "Conv3XC", "ECB", "DOConv"),
                       help="block of more parameters that each 3x3 convolution is in training; in tests it is a plain "
                            "convolution, with the same output (Compact: none, SPAN: Conv3XC)")
    group.add_argument("--G0", type=size, help="number of feature channels outside of the dense blocks (RDN)")
    group.add_argument("--RDNkSize", type=kernel, help="kernel size outside of the dense blocks (RDN)")
    group.add_argument("--RDNconfig", type=parse_rdn_config,
                       help="A or B of the RDN paper, or D,C,G: D dense blocks of C convolutions with growth rate G (RDN)")
    group.add_argument("--group", type=size, help="number of groups of the grouped convolutions (CARN: 1, CARN_M: 4)")
    group.add_argument("--multi_scale", type=parse_scales,
                       help="scales of a multi-scale CARN, such as 2+3+4, one of which is --scale")
    group.add_argument("--carn_variant", choices=("Ahn", "CSD"),
                       help="CARN of its authors, or that of CSD's code, with fewer ReLUs and images in [0, 255]")
    group.add_argument("--depths", type=parse_numbers,
                       help="number of transformer layers in each residual group, such as [6,6,6,6] (SwinIR)")
    group.add_argument("--num_heads", type=parse_numbers,
                       help="number of attention heads in each residual group, such as [6,6,6,6] (SwinIR)")
    group.add_argument("--window_size", type=window, help="side of the attention windows in LR pixels (SwinIR)")
    group.add_argument("--mlp_ratio", type=ratio, help="ratio of hidden to input channels of the MLPs (SwinIR)")
    group.add_argument("--upsampler", choices=("pixelshuffle", "pixelshuffledirect", "nearest+conv"),
                       help="upsampler of the classical, lightweight or real-world variant, in this order (SwinIR; by "
                            "default the first, at --scale 1 none)")
    group.add_argument("--resi_connection", choices=("1conv", "3conv"),
                       help="convolutions at the end of each residual group (SwinIR)")
    group.add_argument("--img_range", type=positive_number,
                       help="maximum pixel value inside the network, to which its input is rescaled (SwinIR, SPAN)")
    group.add_argument("--enc_blk_nums", type=parse_numbers,
                       help="number of blocks in each level of the encoder, such as [1,1,1,28] (NAFNet)")
    group.add_argument("--middle_blk_num", type=size, help="number of blocks between encoder and decoder (NAFNet)")
    group.add_argument("--dec_blk_nums", type=parse_numbers,
                       help="number of blocks in each level of the decoder, such as [1,1,1,1] (NAFNet)")
    group.add_argument("--tlc_size", type=size_or_none,
                       help="side in pixels of the windows of the channel attention in tests, TLC, in place of the whole "
                            "image: 384 for networks trained on crops of 256; 0: the whole image (NAFNet, also as teacher)")
    group.add_argument("--num_blocks", type=parse_numbers,
                       help="number of transformer blocks in each of the four levels, such as [4,6,6,8] (Restormer)")
    group.add_argument("--num_refinement_blocks", type=size, help="number of blocks after the decoder (Restormer)")
    group.add_argument("--heads", type=parse_numbers,
                       help="number of attention heads in each level, such as [1,2,4,8] (Restormer)")
    group.add_argument("--ffn_expansion_factor", type=ratio,
                       help="ratio of hidden to input channels of the feed-forward networks (Restormer)")
    group.add_argument("--LayerNorm_type", choices=("WithBias", "BiasFree"),
                       help="layer normalisation; BiasFree in the published networks for denoising (Restormer)")
    group.add_argument("--num_block", type=size, help="number of residual-in-residual dense blocks (RRDB)")
    group.add_argument("--num_grow_ch", type=size, help="growth rate of the dense blocks (RRDB)")
    group.add_argument("--width_mult", type=positive_number,
                       help="train the first channels of the teacher, this fraction of them, as the student, which shares "
                            "its weights with the teacher (CSD); test.py: test that part of the network")
    group.add_argument("--init_from_teacher", nargs="?", const="first", choices=("first", "norm"),
                       help="initialise the student with weights of the teacher, those of evenly spaced blocks and of some "
                            "channels: the first ones (first, also if no value is given), or those with the largest norm of "
                            "their filters, the same along each residual path (norm)")
    group.add_argument("--pre_train", default="", help="checkpoint file that initialises the student")
    group.add_argument("--lora_rank", type=size, metavar="R",
                       help="train only low-rank adapters of rank R of the convolutions of --pre_train, which are merged in "
                            "the saved models (DSCLoRA, with a teacher and the term SA)")


def _add_loss_flags(parser):
    group = parser.add_argument_group("loss", "Terms of the loss, with S the student's output and T the teacher's: DS is "
                                              "L1(S, HR), TS is L1(S, T); README.md lists all terms.")
    group.add_argument("--loss", default="",
                       help="weighted sum of terms, such as 0.5*DS+0.5*TS+10*SA; replaces the next three flags. For several "
                            "stages of the iterations: 1*DS+1*TS@0-80%%,1*DS_MSE@80-100%%")
    group.add_argument("--alpha", type=probability, default=0.5, help="weight of TS; the weight of DS is 1 - alpha")
    group.add_argument("--feature_loss_used", type=int, choices=(0, 1), default=1,
                       help="1 adds the terms of --feature_distilation_type to the loss, 0 does not")
    group.add_argument("--feature_distilation_type", "--feature_distillation_type", default="10*SA", metavar="TERMS",
                       help="weighted terms of feature distillation: SA, CA, IA, FSP, AT, fitnet, PSA, MMD, RBF")
    group.add_argument("--features", type=parse_features, default="[1,2,3]",
                       help="feature maps that these terms compare: 0 after the head, 1 and 2 at a third and two thirds of "
                            "the body, 3 at its end")
    group.add_argument("--pool_size", type=size, default=1,
                       help="kernel size and stride of the pooling of feature maps (PSA, MMD, RBF)")
    group.add_argument("--pool_type", choices=("max", "avg"), default="max", help="type of that pooling (PSA, MMD, RBF)")
    group.add_argument("--P", type=order, default=2, help="order of the Taylor series of the Gaussian kernel (RBF)")
    group.add_argument("--rbf_gamma", type=positive_number, default=5, help="gamma of the Gaussian kernel (RBF)")


def _add_view_flags(parser):
    group = parser.add_argument_group("data upcycling (DUKD) and cached teacher outputs")
    group.add_argument("--upcycle", type=parse_views, default="",
                       help="additional weighted inputs made from each batch, such as 1*zoom_in+1*zoom_out. zoom_in: crops "
                            "of HR, as large as LR, without ground truth; zoom_out: downscaled LR, with LR as ground truth")
    group.add_argument("--upcycle_every", type=positive, default=1,
                       help="make the inputs of --upcycle in the first and then in every K-th iteration only; their weights "
                            "are multiplied by K, so that the expected loss is the same")
    group.add_argument("--n_zoom_in", type=repeats, default=1, help="number of zoom_in crops per image")
    group.add_argument("--zoom_in_tiles", choices=("image", "batch"), default="image",
                       help="draw the zoom_in crops for each image, or once for all images of a batch, as in DUKD's code")
    group.add_argument("--view_terms", type=parse_names, default="",
                       help="terms A+B of the loss to compute on the inputs of --upcycle (default: all that compare no "
                            "feature maps; terms that need ground truth are omitted where there is none)")
    group.add_argument("--label_consistency", type=probability, default=0,
                       help="probability of each of four transforms (colour inversion, horizontal flip, vertical flip, "
                            "transpose) of the student's input, which are undone on its output; DUKD: 0.3")
    group.add_argument("--label_consistency_views", type=parse_view_names, default="all",
                       help="inputs that --label_consistency transforms, such as original+zoom_in; DUKD: zoom_in")
    group.add_argument("--cache_teacher", nargs="?", const=True, default=False, choices=("self_ensemble",),
                       help="compute the teacher's output once for each whole training image, keep it in the data cache (6 "
                            "bytes per HR pixel), and train with crops of it, instead of running the teacher on each crop. "
                            "This is an approximation: near the border of a crop, and for flipped or transposed crops, the "
                            "two outputs differ. The teacher still runs for terms and inputs that need more. self_ensemble: "
                            "cache the average of its outputs for 8 flips and transposes (EDSR+)")
    group.add_argument("--eco", action="store_true",
                       help="train on mixtures of (LR, HR) and (downscaled teacher output, teacher output): on the latter "
                            "alone in the first quarter of the iterations, on the former alone in the last (Lee and Heo, "
                            "AAAI 2024)")


def _add_term_flags(parser):
    group = parser.add_argument_group("contrastive, distributional and adversarial terms of the loss")
    group.add_argument("--feature_net", choices=("released", "random"), default="released",
                       help="weights of VGG-19 and VQGAN in the terms VGG, CSD, DCR and DMM: the released files, or random "
                            "ones for trials without these files")
    group.add_argument("--vgg_path", default=str(ROOT / "teacher_checkpoint" / "vgg19-dcbb9e9d.pth"),
                       help="checkpoint file of VGG-19 (VGG, CSD)")
    group.add_argument("--vqgan_path", default=str(ROOT / "teacher_checkpoint" / "vqgan_f16_1024.ckpt"),
                       help="checkpoint file of the VQGAN f16-1024 (DCR, DMM)")
    group.add_argument("--d_func", choices=("L1", "cos"), default="L1", help="distance between VGG-19 features (CSD)")
    group.add_argument("--neg_num", type=size, default=10,
                       help="number of negatives per image, which are other LR images of the batch (CSD)")
    group.add_argument("--t_l_remove", type=natural, default=400, help="number of epochs with the term T_DS")
    group.add_argument("--lc_p", type=probability, default=0.5,
                       help="probability of each of the four transforms, here of the teacher's input (LC)")
    group.add_argument("--dcr_negatives", type=repeats_or_none, default=4,
                       help="number of degraded copies of LR whose outputs of the history model are negatives (DCR)")
    group.add_argument("--dcr_noise", type=probability, default=1, help="probability of noise in the degraded copies (DCR)")
    group.add_argument("--dcr_blur", type=probability, default=0, help="probability of blur in the degraded copies (DCR)")
    group.add_argument("--dcr_resize", type=probability, default=0,
                       help="probability of downscaling and upscaling the degraded copies (DCR)")
    group.add_argument("--history_every", type=parse_steps, default="1000-2000-3000",
                       help="iterations between updates of the history model, in the first, second, ... 100,000 iterations "
                            "(DCR)")
    group.add_argument("--nce_type", choices=("hybrid", "image", "patch"), default="hybrid",
                       help="embeddings to compare: of whole images, of patches, or both (NCE)")
    group.add_argument("--nce_mining", choices=("hard", "all"), default="hard",
                       help="negatives: the more similar half of the candidates, or all of them (NCE)")
    group.add_argument("--nce_denominator", choices=("negatives", "standard"), default="negatives",
                       help="denominator of InfoNCE: the negatives alone, as published, or the positive as well (NCE)")
    group.add_argument("--nce_patches", type=repeats, default=8, help="number of patches per image (NCE)")
    group.add_argument("--nce_patch_size", type=size, default=48, help="side of the patches in HR pixels (NCE)")
    group.add_argument("--gan_type", choices=("GAN", "LSGAN", "RGAN", "WGAN", "WGAN_GP"), default="GAN",
                       help="adversarial loss (GAN)")
    group.add_argument("--gan_net", choices=("srgan", "unet"), default="srgan",
                       help="discriminator (GAN): srgan, a score of each image; unet, a score of each pixel, as in MCADKD")
    group.add_argument("--gan_k", type=repeats, default=1, help="discriminator steps per iteration (GAN)")
    group.add_argument("--gan_update", choices=("after", "before"), default="after",
                       help="update the discriminator after the student, or before it and with half of its loss, as in "
                            "MCADKD's code (GAN)")
    group.add_argument("--gan_lr", type=positive_number, default=1e-4, help="learning rate of the discriminator (GAN)")


def _add_training_flags(parser):
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive, default=200, help="number of epochs")
    group.add_argument("--test_every", type=positive, default=1000,
                       help="iterations per epoch; the student is tested and saved after each epoch")
    group.add_argument("--batch_size", type=size, default=16, help="crops per batch, in all processes together")
    group.add_argument("--progressive", type=parse_progressive, default="", metavar="PATCH/BATCH@START,...",
                       help="sizes of crops and batches that change in the course of the training, in place of --patch_size "
                            "and --batch_size, with the iterations from which they apply, or percent of all iterations, "
                            "such as 128/64@0,160/40@92000 or 128/64@0,160/40@30%% (Restormer)")
    group.add_argument("--split_batch", type=size, default=1,
                       help="divide each batch into this many parts and accumulate their gradients, to save memory; terms "
                            "that compare the images of a batch (IA, CSD, NCE) then compare those of a part")
    group.add_argument("--optimizer", choices=("ADAM", "ADAMW", "MUON", "SGD", "RMSprop"), default="ADAM",
                       help="optimiser; MUON orthogonalises the updates of convolutions and matrices, whose size is that of "
                            "ADAM's, and is ADAMW for the other parameters")
    group.add_argument("--lr", type=positive_number, default=1e-4, help="learning rate")
    group.add_argument("--decay", type=parse_decay, default="150-300-450-600",
                       help="epochs, counted from 1, at whose start the learning rate is multiplied by --gamma, as in "
                            "EDSR-PyTorch; or iterations, such as 100000-200000it, after which it is; or cosine: cosine "
                            "annealing to --lr_end")
    group.add_argument("--decay_from", type=natural, default=0,
                       help="number of iterations at the start, without decay, after which --decay cosine begins")
    group.add_argument("--lr_end", type=not_negative, default=0, help="learning rate at the end of --decay cosine")
    group.add_argument("--warmup", type=natural, default=0,
                       help="number of iterations at the start over which the learning rate rises linearly")
    group.add_argument("--gamma", type=decay_factor, default=0.5, help="factor of the learning rate at each step of --decay")
    group.add_argument("--momentum", type=fraction, default=0.9, help="momentum of SGD and RMSprop")
    group.add_argument("--betas", type=parse_betas, default="0.9,0.999", help="betas of ADAM, ADAMW and MUON")
    group.add_argument("--epsilon", type=positive_number, default=1e-8, help="epsilon of ADAM, ADAMW, MUON and RMSprop")
    group.add_argument("--weight_decay", type=not_negative, default=0,
                       help="weight decay: an L2 penalty, or with ADAMW decoupled from the gradient")
    group.add_argument("--gclip", type=not_negative, default=0,
                       help="maximum absolute value of each element of the gradient, as in EDSR; 0 does not clip it")
    group.add_argument("--grad_norm", type=not_negative, default=0,
                       help="maximum norm of the gradient; 0 does not clip it")
    group.add_argument("--ema", type=fraction, default=0,
                       help="decay of the exponential moving average of the student's weights, which is then tested and "
                            "saved in their place (DUKD, DCKD: 0.999); 0 disables it")
    group.add_argument("--print_every", type=positive, default=100, help="iterations between lines of the training log")
    group.add_argument("--log_gradients", type=natural, default=0,
                       help="every this many iterations, compute the norm of each weighted term's gradient at the student's "
                            "output (for terms that compare feature maps: at these; for T_DS: at the teacher's output), all "
                            "inputs of --upcycle together; loss.csv holds their means over an epoch; 0 disables it")


def _add_experiment_flags(parser):
    group = parser.add_argument_group("experiment")
    group.add_argument("--ckp_dir", default="first_try", help="name of the run, a folder in experiment/ for its results")
    group.add_argument("--resume", type=lambda word: int(word) if word in ("0", "1") else word, choices=(0, 1, "auto"),
                       default=0, help="1: continue the run in --ckp_dir; auto: continue it if it exists, else start it")
    group.add_argument("--reset", action="store_true", help="replace the run in --ckp_dir, if there is one, by a new run")
    group.add_argument("--save_every", type=not_negative, default=60,
                       help="seconds between saves of the training state, from which --resume continues")
    group.add_argument("--tensorboard", action="store_true",
                       help="write the curves, and the centre of the first image of each test set, for TensorBoard to the "
                            "run's folder tensorboard/")
    group.add_argument("--save_models", action="store_true", help="keep the model of each epoch, not only best and latest")
    group.add_argument("--save_results", action="store_true", help="save the upscaled test images")
    group.add_argument("--save_gt", action="store_true", help="save LR and HR images too, with --save_results")


def _add_testing_flags(parser):
    group = parser.add_argument_group("testing")
    group.add_argument("--ckp_path", default="",
                       help="checkpoint file to test, whose architecture, sizes and scale are detected; compare.py, "
                            "visualize.py, summary.py: several, LABEL=FILE+LABEL=FILE")
    group.add_argument("--TS", choices=("T", "S"), default="S",
                       help="test the student (S) or the teacher (T), whose checkpoint is --ckp_path, or for T without "
                            "--ckp_path that of --teacher")
    group.add_argument("--metric_space", choices=("y", "rgb"), default="y",
                       help="PSNR and SSIM on the Y channel of YCbCr, as in papers on super-resolution, or on RGB, as in "
                            "most papers on restoration (PSNR over all channels, SSIM as the mean of the channels)")
    group.add_argument("--shave", type=natural,
                       help="pixels left out at each border for PSNR and SSIM (default: the scale; 0 at scale 1)")
    group.add_argument("--metrics", type=parse_metrics, default="", metavar="NAME+NAME",
                       help="further metrics, computed by the package pyiqa on whole RGB images: lpips+dists+niqe or others "
                            "of its names; those that need no HR, such as niqe, also on images without")
    group.add_argument("--chop", action="store_true", help="upscale large images in overlapping tiles, to save memory")
    group.add_argument("--chop_mem", type=positive_number,
                       help="memory limit of --chop in GB (10^9 bytes) (default: half of the free memory, on a CPU at most "
                            "1; 1 for networks with global operations, whose results depend on the tiles)")
    group.add_argument("--self_ensemble", action="store_true", help="average the outputs for 8 flips and transposes (EDSR+)")


def _add_comparison_flags(parser):
    group = parser.add_argument_group("compare.py")
    group.add_argument("--html", action="store_true",
                       help="write compare.html too, a page in one file: a slider between any two results, and a table that "
                            "sorts")
    group.add_argument("--html_images", type=size, default=10,
                       help="images of each test set in that page, the first ones; of larger ones it holds the 768 x 768 "
                            "pixels where bicubic upscaling, at scale 1 the input, has the largest error")


def _add_visualization_flags(parser):
    group = parser.add_argument_group("visualize.py")
    group.add_argument("--image", help="name of the image of --data_test (default: the first one)")
    group.add_argument("--point", type=parse_point,
                       help="pixel X,Y of HR, from the top left, whose affinity to the pixels around it is shown (default: "
                            "the strongest edge where bicubic upscaling, at scale 1 the input, has the largest error)")
    group.add_argument("--crop", type=size, help="side in HR pixels of the crop around that pixel (default: 96)")


def _add_summary_flags(parser):
    group = parser.add_argument_group("summary.py")
    group.add_argument("--output_size", type=parse_output_size, default=str(PAPER_SIZE), metavar="WIDTHxHEIGHT",
                       help="size in pixels of the SR image for which costs are computed and measured")
    group.add_argument("--time", action="store_true",
                       help="measure the time and the peak memory of a forward pass on this machine, with --precision, "
                            "--chop and --self_ensemble as in a test")
    group.add_argument("--budget", type=parse_seconds, metavar="TIME",
                       help="measure the presets of networks at --scale, and list those whose forward pass takes at most "
                            "this time on this machine, such as 20ms or 0.5s, those with more FLOPs first")


def _add_export_flags(parser):
    group = parser.add_argument_group("export.py", "Writes the network of --ckp_path, in --precision single or half, for "
                                                   "images in [0, 1] unless --rgb_range is given.")
    group.add_argument("--format", choices=EXPORT_FORMATS,
                       help="onnx: ONNX, with dynamic height and width; safetensors: weights, which --ckp_path reads too; "
                            "torchscript: TorchScript; ncnn: a pair .param and .bin; spandrel: weights for chaiNNer, "
                            "ComfyUI and other programs that use spandrel")
    group.add_argument("--output", "-o", default="", metavar="FILE",
                       help="file to write, ending in .onnx, .safetensors, .pt, .param or .pth, as the format requires")
    group.add_argument("--int8", default="", metavar="FOLDER",
                       help="quantise --format onnx to int8, calibrated on the LR images of this folder; convolutions from "
                            "and to an image stay in float32. PSNR and speed are compared with float32, on --data_test if "
                            "given")
    group.add_argument("--license", default="", metavar="TEXT", help="licence of the weights, for the metadata of the file")


def parse(argv: Sequence[str] | None = None, training: bool = True) -> argparse.Namespace:
    """Parse the flags of a command line, by default sys.argv; exits with one line and status 2 on a mistake.

    Beside the flags the namespace has `given`, a frozenset of the names of flags that are on the command line or in an @FILE
    (without `training` also width_mult of a preset, as it selects the part of the network to test; otherwise also teacher of
    --published, a part of which is the student of --width_mult). `loss` is the loss string also where it follows from
    --alpha and the flags after it. Paths have ~ expanded.
    """
    parser = make_parser()
    try:
        argv = config.expand(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        parser.error(str(error))
    defaults = vars(parser.parse_args([]))
    unset = object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}

    if given.get("published") == "list":
        print(published.listing())
        parser.exit()
    names = given["template"].split("+") if given.get("template") else []
    for name in names:
        if name not in TEMPLATES:
            parser.error(f"--template {given['template']}: {name!r} is not a preset; the presets are {', '.join(TEMPLATES)}")
    try:
        presets = [published.preset(given["published"], TEMPLATES)] if given.get("published") else []
    except ValueError as error:
        parser.error(str(error))
    preset = join_presets(presets + [TEMPLATES[name] for name in names])
    rgb_range = given.get("rgb_range", defaults["rgb_range"])
    factor = rgb_range / float(preset.pop("image_range", rgb_range))
    if factor != 1:
        for name in preset.keys() & {"loss", "feature_distilation_type"}:
            preset[name] = convert_weights(preset[name], factor)
        preset["epsilon"] = f"{factor * defaults['epsilon']:g}"  # Adam compares it with the gradient, which grows with L1
        for name in preset.keys() & {"gclip", "grad_norm"}:
            preset[name] = f"{factor * float(preset[name]):g}"
    argv_of_preset = [f"--{name}" if value is True else f"--{name}={value}" for name, value in preset.items()]
    preset = {name: getattr(parser.parse_args(argv_of_preset), name) for name in preset}
    if "model" in given and given["model"] != preset.get("model", given["model"]):
        flag = next(name for name in ("template", "published") if given.get(name))
        parser.error(f"--model {given['model']} contradicts --{flag} {given[flag]}, which contains the sizes of "
                     f"{preset['model']}: give one of them")

    args = argparse.Namespace(**{**defaults, **preset, **given}, given=frozenset(given))
    if not training and args.width_mult:
        args.given |= {"width_mult"}
    if training and "pre_train" not in given:
        args.given |= {"teacher"} & preset.keys()
    duplicates = [f"--{name}" for name in PUBLISHED_LOSS_FLAGS if name in given]
    if args.loss and duplicates:
        parser.error(f"{', '.join(duplicates)} cannot be combined with the loss string {args.loss}: give one of them")
    try:
        args.loss = args.loss or published_loss(args)
        parse_stages(args.loss)
        for name in PATHS:
            setattr(args, name, expanded(name, getattr(args, name)))
    except ValueError as error:
        parser.error(str(error))
    set_crop_sizes(parser, args, training)
    check_combinations(parser, args)
    args.teacher = args.teacher or [args.model]
    args.teacher_precision = args.teacher_precision or args.precision
    return args


def shave_of(args: argparse.Namespace) -> int:
    """Return the number of pixels that PSNR and SSIM leave out at each border, at args.scale."""
    if args.shave is not None:
        return args.shave
    return args.scale if args.scale > 1 else 0


def join_presets(presets: Sequence[dict[str, object]]) -> dict[str, object]:
    """Merge presets into one, where later ones override earlier ones.

    A preset with a loss also removes the loss of earlier ones, whichever flags it was given by, and a network their sizes.
    """
    preset = {}
    for later in presets:
        replaced = {"loss"} if later.keys() & set(PUBLISHED_LOSS_FLAGS) else set()
        if "loss" in later:
            replaced |= set(PUBLISHED_LOSS_FLAGS)
        if "model" in later:
            replaced |= SIZES
        preset = {**{flag: value for flag, value in preset.items() if flag not in replaced}, **later}
    return preset


def convert_weights(loss: str, factor: float) -> str:
    """Return a loss string for images that are `factor` times as large in value as those of its published weights.

    The new loss is `factor` times the old one. L1 terms between images grow so by themselves, an MSE grows with the square
    of the factor, the other terms do not grow; the weights make up for it.
    """
    start, strings = 0, []
    for end, terms in parse_stages(loss):
        string = "+".join(f"{weight * factor ** (1 - EXPONENTS.get(name, 0)):g}*{name}" for weight, name in terms)
        strings.append(string if "@" not in loss else f"{string}@{start:g}-{end:g}%")
        start = end
    return ",".join(strings)


def set_crop_sizes(parser: Parser, args: argparse.Namespace, training: bool) -> None:
    """Set patch_size and batch_size to the smallest ones of --progressive; exit where sizes contradict each other."""
    given = [f"--{name}" for name in ("patch_size", "batch_size") if name in args.given]
    if args.progressive and given:
        parser.error(f"{' and '.join(given)} cannot be combined with --progressive {args.progressive}, which contains the "
                     "sizes of crops and batches; give --progressive= for a constant size")
    try:
        stages = crop_stages(args)
    except ValueError as error:
        parser.error(str(error))
    sizes, flag = (("--progressive: crops of ", "--progressive: batches of ") if args.progressive
                   else ("--patch_size ", "--batch_size "))
    for stage in stages:
        if training and stage.patch % args.scale:
            parser.error(f"{sizes}{stage.patch} (HR pixels) is not a multiple of --scale {args.scale}")
        if stage.batch % (args.n_GPUs * args.split_batch):
            parser.error(f"{flag}{stage.batch} cannot be divided evenly by --n_GPUs {args.n_GPUs} x --split_batch "
                         f"{args.split_batch}")
    args.patch_size, args.batch_size = (min(getattr(stage, name) for stage in stages) for name in ("patch", "batch"))


def check_combinations(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with one line and status 2 where flags contradict each other."""
    for name in ("upcycle_every", "n_zoom_in", "zoom_in_tiles", "view_terms"):
        if name in args.given and not args.upcycle:
            parser.error(f"--{name} applies to the inputs of --upcycle, which is not given: give both")
    for name in ("n_zoom_in", "zoom_in_tiles"):
        if name in args.given and "zoom_in" not in [view for _, view in args.upcycle]:
            parser.error(f"--{name} applies to the zoom_in crops, but --upcycle does not contain zoom_in")
    transformed, given = set(args.label_consistency_views), {"label_consistency", "label_consistency_views"} & args.given
    absent = transformed - {"all", "original", *(name for _, name in args.upcycle)}
    if "label_consistency_views" in given and not args.label_consistency:
        parser.error("--label_consistency_views names inputs for --label_consistency, which is not given: give both")
    if given and absent:
        parser.error(f"--label_consistency_views {'+'.join(args.label_consistency_views)}: --upcycle does not contain "
                     f"{' and '.join(sorted(absent))}")
    if args.scale == 1:
        if args.upcycle:
            parser.error("--scale 1: --upcycle needs a scale of 2 or more, as a crop of HR is not degraded; leave it out, "
                         "or give --upcycle= where a preset such as DUKD contains it")
        if args.eco:
            parser.error("--scale 1: --eco needs a scale of 2 or more, as its inputs are downscaled teacher outputs")
    if args.degrade:
        for name, effect in (("cache_teacher", "caches the outputs for others (in place of best, give best_running)"),
                             ("eco", "mixes them with inputs that are not degraded"),
                             ("upcycle", "adds inputs that are not degraded, or degraded ground truth"),
                             ("pair_dirs", "names the folders of degraded inputs")):
            if getattr(args, name):
                parser.error(f"--degrade {args.degrade} makes new inputs in each iteration, but --{name} {effect}: give one "
                             "of them")
    if args.cache_teacher and args.ext == "img":
        parser.error("--cache_teacher needs the data cache, which --ext img disables: give one of them")
    if args.lora_rank and not args.pre_train:
        parser.error("--lora_rank trains adapters of a pretrained network, which is not given: give --pre_train FILE")
    if args.cache_teacher and args.width_mult:
        parser.error("--cache_teacher needs a fixed teacher, but --width_mult trains it with the student: give one of them")
    if "teacher_choice" in args.given and len(args.teacher or ()) < 2:
        parser.error("--teacher_choice applies to several teachers: give --teacher [A,B]")
    if args.eco and args.width_mult:
        parser.error("--eco needs a fixed teacher, but --width_mult trains it with the student: give one of them")
    if "lr_end" in args.given and args.decay != "cosine":
        parser.error(f"--lr_end {args.lr_end:g} is the end of --decay cosine, which is not given: give both")
    if "decay_from" in args.given and args.decay != "cosine":
        parser.error(f"--decay_from {args.decay_from} is the start of --decay cosine, which is not given: give both")
    if "decay_from" in args.given and args.decay_from >= args.epochs * args.test_every:
        parser.error(f"--decay_from {args.decay_from} must be shorter than the run, which has "
                     f"{args.epochs * args.test_every} iterations (--epochs x --test_every)")
    if args.lr_end > args.lr:
        parser.error(f"--lr_end {args.lr_end:g} must not be larger than --lr {args.lr:g}")
    ends = [0, *stage_ends(parse_stages(args.loss), args.epochs * args.test_every)]
    if len(set(ends)) < len(ends):
        parser.error(f"--loss {args.loss}: a run of {ends[-1]} iterations (--epochs x --test_every) has none in one of the "
                     "stages")
    if args.warmup >= args.epochs * args.test_every and args.warmup:
        parser.error(f"--warmup {args.warmup} must be shorter than the run, which has {args.epochs * args.test_every} "
                     "iterations (--epochs x --test_every)")
    if args.log_gradients > args.test_every:
        parser.error(f"--log_gradients {args.log_gradients}: an epoch has fewer iterations, --test_every {args.test_every}")
    if args.resume and args.reset:
        parser.error(f"--resume {args.resume} continues a run, but --reset replaces it: give one of them")
    if args.save_gt and not args.save_results:
        parser.error("--save_gt saves images only together with --save_results: give both")
    for name in args.data_test:
        if name != PurePath(name).name or name == "..":
            parser.error(f"--data_test {name}: give the name of a folder in --dir_data or --dir_data/benchmark, such as "
                         f"{PurePath(os.path.normpath(name)).name.strip('.') or 'Set5'}")
    if "html_images" in args.given and not args.html:
        parser.error("--html_images is the number of images in the page of --html, which is not given: give both")
    if args.chop_mem and not args.chop:
        parser.error("--chop_mem is the memory limit of --chop, which is not given: give both")
    if args.int8 and args.format not in (None, "onnx"):
        parser.error(f"--int8 quantises --format onnx, not {args.format}: give one of them")
    networks = [f"--{name}" for name in sorted(args.given & (SIZES | {"ckp_path", "published", "template", "width_mult"}))]
    if args.budget and networks:
        parser.error(f"--budget lists presets of networks, and cannot be combined with {', '.join(networks)}; --time "
                     "measures a given network")
    experiments = str(ROOT / "experiment")
    folder, cache = os.path.normpath(os.path.join(experiments, args.ckp_dir)), os.path.join(experiments, "cache")
    if folder == experiments or f"{folder}/".startswith(f"{cache}/"):
        parser.error(f"--ckp_dir {args.ckp_dir!r}: {folder} is " + ("the folder of all runs" if folder == experiments else
                     "the folder of decoded images") + "; give the run another name")


def published_loss(args: argparse.Namespace) -> str:
    """Return the loss string of FAKD's flags: `--alpha 0.5 --feature_distilation_type 10*SA` -> 0.5*DS+0.5*TS+10*SA."""
    terms = [f"{weight:g}*{name}" for weight, name in ((1 - args.alpha, "DS"), (args.alpha, "TS")) if weight]
    if args.feature_loss_used:
        terms.append(args.feature_distilation_type)
    return "+".join(terms)
