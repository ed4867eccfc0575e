"""Every flag of train.py and test.py. Imports no torch, so that --help is instant."""
import argparse
import difflib
import os
import re
import sys
from pathlib import Path, PurePath

import config

from option_types import (
    decay_factor,
    expanded,
    fraction,
    kernel,
    natural,
    not_negative,
    order,
    parse_betas,
    parse_decay,
    parse_features,
    parse_list,
    parse_loss,
    parse_names,
    parse_numbers,
    parse_once,
    parse_rdn_config,
    parse_scales,
    parse_steps,
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
    window,
)

from template import TEMPLATES

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = "EDSR", "RCAN", "CARN", "CARN_M", "RDN", "IMDN", "SAN", "SwinIR"
PUBLISHED_LOSS_FLAGS = ("alpha", "feature_loss_used", "feature_distilation_type")
SIZES = {flag for preset in TEMPLATES.values() if "model" in preset for flag in preset}
PATHS = "dir_data", "dir_demo", "dir_cache", "vgg_path", "vqgan_path", "pre_train", "ckp_dir", "ckp_path", "teacher"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        near = unknown and difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.7)
        if near:
            message += f"; did you mean {near[0]}?"
        self.exit(2, f"error: {' '.join(message.splitlines())}\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Leaves out defaults that say nothing."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


def make_parser():
    parser = Parser(description="Distil a large super-resolution network into a small one, score it, use it. "
                                "@FILE reads flags from a file, one on a line; config.txt of a run is such a file.",
                    allow_abbrev=False, formatter_class=Help)

    group = parser.add_argument_group("machine")
    group.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    group.add_argument("--gpu_id", type=natural, default=0, help="which GPU to use")
    group.add_argument("--n_GPUs", type=processes, default=1,
                       help="train in so many processes on this machine, one for each GPU (with --cpu, so many on the CPU), "
                            "that divide each batch among them; torchrun does the same on several machines")
    group.add_argument("--n_threads", type=processes_or_none, default=2,
                       help="processes that load training data; 0 loads in the main one")
    group.add_argument("--precision", choices=("single", "half", "bf16"), default="single",
                       help="of the networks' arithmetic; weights and losses stay float32")
    group.add_argument("--compile", action="store_true",
                       help="train with networks compiled by torch.compile: a minute at the start, faster after, above all "
                            "on GPUs; a network that cannot be compiled runs as it is")
    group.add_argument("--seed", type=seed, default=1, help="of weights, data order, crops and augmentation")

    group = parser.add_argument_group("data")
    group.add_argument("--dir_data", default=str(ROOT / "dataset"), help="folder that holds the datasets")
    group.add_argument("--data_train", type=parse_list, default="DIV2K",
                       help="training sets, A+B: Sample, DIV2K, or a folder DIR_DATA/A/HR")
    group.add_argument("--data_test", type=parse_once, default="Set5+Set14+B100+Urban100",
                       help="test sets, A+B: Sample, DIV2K, a folder DIR_DATA/benchmark/A/HR or DIR_DATA/A/HR, or Demo")
    group.add_argument("--dir_demo", default=str(ROOT / "demo"), help="folder of your own images for --data_test Demo")
    group.add_argument("--data_range", default="1-800/801-810", help="DIV2K images, train/test")
    group.add_argument("--ext", choices=("sep", "img"), default="sep",
                       help="sep: decode each image once into a memory-mapped cache; img: read the files every time")
    group.add_argument("--dir_cache", default="",
                       help="folder of that cache (default: beside the data, or experiment/cache where that is read-only)")
    group.add_argument("--scale", type=int, choices=(2, 3, 4, 8), default=4, help="upscaling factor")
    group.add_argument("--patch_size", type=size, default=192, help="side of the training crops, in HR pixels")
    group.add_argument("--no_augment", action="store_true", help="no flips and transposes of the crops")
    group.add_argument("--rgb_range", type=pixel_range, default=255,
                       help="images reach the losses in [0, this]; published weights of DUKD, DCKD and MCADKD are for 1")

    group = parser.add_argument_group("networks (sizes left out: the file's, or those of the published student)")
    group.add_argument("--template", default="", help="presets, A+B, that explicit flags override: " + ", ".join(TEMPLATES))
    group.add_argument("--model", default="RCAN", help="the student: " + ", ".join(NETWORKS))
    group.add_argument("--teacher", type=parse_list, default=None,
                       help="[A,B]: names of networks found in teacher_checkpoint/, or checkpoint files; of several, one "
                            "drawn per batch (default: the student's network)")
    group.add_argument("--n_resgroups", type=size, help="residual groups of RCAN and SAN")
    group.add_argument("--n_resblocks", type=size, help="residual blocks of EDSR, and of each group of RCAN and SAN")
    group.add_argument("--n_feats", type=size, help="channels, of all but RDN (SwinIR's embed_dim)")
    group.add_argument("--reduction", type=size, help="channels per squeezed channel in attention of RCAN and SAN")
    group.add_argument("--res_scale", type=not_negative, help="factor of EDSR's residual branches")
    group.add_argument("--n_inner", type=size, help="channels of SAN's non-local block")
    group.add_argument("--n_modules", type=size, help="distillation modules of IMDN")
    group.add_argument("--G0", type=size, help="channels of RDN")
    group.add_argument("--RDNkSize", type=kernel, help="kernel of RDN's convolutions outside of its blocks")
    group.add_argument("--RDNconfig", type=parse_rdn_config,
                       help="A or B of RDN's paper, or D,C,G: D blocks of C convolutions that add G channels each")
    group.add_argument("--group", type=size, help="groups of CARN's convolutions; CARN_M has 4")
    group.add_argument("--multi_scale", type=parse_scales,
                       help="scales that CARN has a tail for, such as 2+3+4; --scale is the one in use")
    group.add_argument("--depths", type=parse_numbers, help="blocks of each of SwinIR's groups, such as [6,6,6,6]")
    group.add_argument("--num_heads", type=parse_numbers, help="attention heads in each of SwinIR's groups, as many")
    group.add_argument("--window_size", type=window, help="side of SwinIR's windows, in LR pixels")
    group.add_argument("--mlp_ratio", type=ratio, help="hidden channels per channel in SwinIR's MLPs")
    group.add_argument("--upsampler", choices=("pixelshuffle", "pixelshuffledirect", "nearest+conv"),
                       help="SwinIR's: classical, lightweight, real-world")
    group.add_argument("--resi_connection", choices=("1conv", "3conv"), help="convolutions that end SwinIR's groups")
    group.add_argument("--img_range", type=positive_number, help="range that SwinIR brings images to inside")
    group.add_argument("--width_mult", type=positive_number,
                       help="the student is this part of the teacher's channels and shares its weights; in test.py: score "
                            "that slice of the file")
    group.add_argument("--init_from_teacher", action="store_true",
                       help="the student starts from the teacher's weights: of the first channels and, with fewer blocks, "
                            "of blocks evenly spaced from the first to the last")
    group.add_argument("--pre_train", default="", help="checkpoint whose weights the student starts from")

    group = parser.add_argument_group("distillation")
    group.add_argument("--loss", default="", help="weighted terms, such as 0.5*DS+0.5*TS+10*SA; replaces the next three")
    group.add_argument("--alpha", type=probability, default=0.5, help="weight of TS; DS gets 1 - alpha")
    group.add_argument("--feature_loss_used", type=int, choices=(0, 1), default=1, help="0 turns the feature terms off")
    group.add_argument("--feature_distilation_type", "--feature_distillation_type", default="10*SA",
                       help="weighted feature terms: SA, CA, IA, FSP, AT, fitnet, PSA, MMD, RBF")
    group.add_argument("--features", type=parse_features, default="[1,2,3]",
                       help="maps that feature terms compare: 0 head, 1 and 2 in the body, 3 its end")
    group.add_argument("--pool_size", type=size, default=1, help="pooling of PSA, MMD and RBF")
    group.add_argument("--pool_type", choices=("max", "avg"), default="max", help="pooling of PSA, MMD and RBF")
    group.add_argument("--P", type=order, default=2, help="order of RBF's Taylor series")
    group.add_argument("--rbf_gamma", type=positive_number, default=5, help="gamma of RBF")

    group = parser.add_argument_group("views of a batch, what the student sees of it, and a teacher asked once")
    group.add_argument("--upcycle", type=parse_views, default="",
                       help="inputs made from the batch as further, weighted views of it, such as 1*zoom_in+1*zoom_out: "
                            "zoom_in, tiles of HR in LR's size, without a truth; zoom_out, LR downscaled by --scale, whose "
                            "truth is LR")
    group.add_argument("--n_zoom_in", type=repeats, default=1, help="tiles of zoom_in per image")
    group.add_argument("--view_terms", type=parse_names, default="",
                       help="terms that look at these views too, A+B; left out: all that can, but those that compare maps")
    group.add_argument("--label_consistency", type=probability, default=0,
                       help="probability of each of four operations (inverted colours, two flips, transpose) on an image "
                            "that the student sees; its output is mapped back (0.3 in DUKD)")
    group.add_argument("--cache_teacher", action="store_true",
                       help="ask each teacher once for each whole training image, in --precision, and keep the answers in "
                            "the data's cache (6 bytes per HR pixel), in place of its outputs for the crops; where terms or "
                            "views need more, it runs for them. An approximation: near a crop's border the answer knows "
                            "what lies beyond, and that to a flipped or transposed crop is that to the image, flipped")

    group = parser.add_argument_group("contrastive, distributional and adversarial terms")
    group.add_argument("--feature_net", choices=("released", "random"), default="released",
                       help="of VGG, CSD, DCR, DMM: the released VGG-19 and VQGAN, or untrained ones, for trying things out")
    group.add_argument("--vgg_path", default=str(ROOT / "teacher_checkpoint" / "vgg19-dcbb9e9d.pth"),
                       help="VGG-19 of VGG and CSD")
    group.add_argument("--vqgan_path", default=str(ROOT / "teacher_checkpoint" / "vqgan_f16_1024.ckpt"),
                       help="VQGAN f16-1024 of DCR and DMM")
    group.add_argument("--d_func", choices=("L1", "cos"), default="L1", help="distance of CSD")
    group.add_argument("--neg_num", type=size, default=10, help="negatives of CSD, other images of the batch")
    group.add_argument("--t_l_remove", type=natural, default=400, help="epoch after which T_DS ends")
    group.add_argument("--lc_p", type=probability, default=0.5, help="probability of each of LC's four operations")
    group.add_argument("--dcr_negatives", type=repeats_or_none, default=4,
                       help="degraded inputs of DCR's history model, beside LR")
    group.add_argument("--dcr_noise", type=probability, default=1, help="probability of noise in them")
    group.add_argument("--dcr_blur", type=probability, default=0, help="probability of blur in them")
    group.add_argument("--dcr_resize", type=probability, default=0, help="probability of resizing and back in them")
    group.add_argument("--history_every", type=parse_steps, default="1000-2000-3000",
                       help="iterations between updates of DCR's history model, in the first, second, ... 100,000")
    group.add_argument("--nce_type", choices=("hybrid", "image", "patch"), default="hybrid",
                       help="embeddings that NCE compares")
    group.add_argument("--nce_mining", choices=("hard", "all"), default="hard",
                       help="NCE's negatives: the more similar half, or all")
    group.add_argument("--nce_denominator", choices=("negatives", "standard"), default="negatives",
                       help="NCE's normalisation: over the negatives, as published, or over the positive as well")
    group.add_argument("--nce_patches", type=repeats, default=8, help="crops per image of NCE's patch embedding")
    group.add_argument("--nce_patch_size", type=size, default=48, help="their side in HR pixels")
    group.add_argument("--gan_type", choices=("GAN", "LSGAN", "RGAN", "WGAN", "WGAN_GP"), default="GAN", help="kind of GAN")
    group.add_argument("--gan_k", type=repeats, default=1, help="steps of GAN's discriminator per iteration")
    group.add_argument("--gan_lr", type=positive_number, default=1e-4, help="its learning rate")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive, default=200, help="epochs to train")
    group.add_argument("--test_every", type=positive, default=1000, help="batches per epoch; an epoch ends with a test")
    group.add_argument("--batch_size", type=size, default=16, help="crops per batch")
    group.add_argument("--split_batch", type=size, default=1,
                       help="parts that a batch is divided into, whose gradients are added up: less memory; terms that "
                            "compare the images of a batch (IA, CSD, NCE) see those of a part")
    group.add_argument("--optimizer", choices=("ADAM", "SGD", "RMSprop"), default="ADAM", help="optimiser")
    group.add_argument("--lr", type=positive_number, default=1e-4, help="learning rate")
    group.add_argument("--decay", type=parse_decay, default="150-300-450-600",
                       help="epochs, or iterations such as 100000-200000it, after which the rate is multiplied by gamma; or "
                            "cosine: to 0 over all epochs")
    group.add_argument("--warmup", type=natural, default=0, help="first iterations, over which the rate rises to --lr")
    group.add_argument("--gamma", type=decay_factor, default=0.5, help="factor of step decay")
    group.add_argument("--momentum", type=fraction, default=0.9, help="of SGD and RMSprop")
    group.add_argument("--betas", type=parse_betas, default="0.9,0.999", help="of ADAM")
    group.add_argument("--epsilon", type=positive_number, default=1e-8, help="of ADAM and RMSprop")
    group.add_argument("--weight_decay", type=not_negative, default=0, help="L2 penalty of the weights")
    group.add_argument("--gclip", type=not_negative, default=0, help="clip the gradient's norm to this; 0: not at all")
    group.add_argument("--ema", type=fraction, default=0, help="decay of the student's moving average, which is then "
                       "what is tested and saved (0.999 in DUKD and DCKD); 0: none")
    group.add_argument("--print_every", type=positive, default=100, help="batches between lines of the log")

    group = parser.add_argument_group("experiment")
    group.add_argument("--ckp_dir", default="first_try", help="folder of the run, under experiment/")
    group.add_argument("--resume", type=lambda word: int(word) if word in ("0", "1") else word, choices=(0, 1, "auto"),
                       default=0, help="1 continues the run in --ckp_dir exactly; auto does so if there is one, and else "
                                       "starts it")
    group.add_argument("--reset", action="store_true", help="replace a run that --ckp_dir already holds")
    group.add_argument("--save_every", type=not_negative, default=60,
                       help="seconds between saves of the state to resume from")
    group.add_argument("--save_models", action="store_true", help="keep the model of every epoch")
    group.add_argument("--save_results", action="store_true", help="write the upscaled test images")
    group.add_argument("--save_gt", action="store_true", help="with --save_results, write LR and HR beside them")

    group = parser.add_argument_group("testing")
    group.add_argument("--ckp_path", default="", help="checkpoint to score; network, sizes and scale are read from it")
    group.add_argument("--TS", choices=("T", "S"), default="S",
                       help="what to score: S the student in --ckp_path; T the teacher there, or else the one found for "
                            "--teacher, --scale")
    group.add_argument("--chop", action="store_true", help="upscale large images in tiles, in bounded memory")
    group.add_argument("--chop_mem", type=positive_number,
                       help="GB (10^9 bytes) that tiles of --chop may take while they are computed (default: half of what "
                            "is free; 1 for networks that look at the whole image, whose results depend on it)")
    group.add_argument("--self_ensemble", action="store_true", help="average over the 8 flips and transposes")
    return parser


def parse(argv=None, training=True):
    """Namespace of all flags, from sys.argv where argv is None; a mistake prints one line and exits with status 2.

    Beyond the flags: `given`, the names of those that were given explicitly (where nothing is trained, width_mult also if a
    preset says it: it is what to score); `loss`, the loss string, whichever flags said it. `data_train`, `data_test` and
    `teacher` are lists, and ~ in paths is expanded.
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

    names = given["template"].split("+") if given.get("template") else []
    for name in names:
        if name not in TEMPLATES:
            parser.error(f"--template {given['template']}: {name!r} is no preset; there are {', '.join(TEMPLATES)}")
    preset = joined(names)
    argv_of_preset = [f"--{name}" if value is True else f"--{name}={value}" for name, value in preset.items()]
    preset = {name: getattr(parser.parse_args(argv_of_preset), name) for name in preset}
    if "model" in given and given["model"] != preset.get("model", given["model"]):
        parser.error(f"--model {given['model']} beside --template {given['template']}, which has the sizes of "
                     f"{preset['model']}: give the one or the other")

    args = argparse.Namespace(**{**defaults, **preset, **given}, given=frozenset(given))
    if not training and args.width_mult:
        args.given |= {"width_mult"}
    said_twice = [f"--{name}" for name in PUBLISHED_LOSS_FLAGS if name in given]
    if args.loss and said_twice:
        parser.error(f"{', '.join(said_twice)} beside the loss string {args.loss}: give the one or the other")
    try:
        args.loss = args.loss or published_loss(args)
        parse_loss(args.loss)
        for name in PATHS:
            setattr(args, name, expanded(name, getattr(args, name)))
    except ValueError as error:
        parser.error(str(error))
    if training and args.patch_size % args.scale:
        parser.error(f"--patch_size {args.patch_size} (HR pixels) is not a multiple of --scale {args.scale}")
    check_together(parser, args)
    args.teacher = args.teacher or [args.model]
    return args


def joined(names):
    """The flags of several presets as one: a later one replaces also what an earlier one says of the same in other flags."""
    preset = {}
    for name in names:
        later = TEMPLATES[name]
        replaced = {"loss"} if later.keys() & set(PUBLISHED_LOSS_FLAGS) else set()
        if "loss" in later:
            replaced |= set(PUBLISHED_LOSS_FLAGS)
        if "model" in later:
            replaced |= SIZES
        preset = {**{flag: value for flag, value in preset.items() if flag not in replaced}, **later}
    return preset


def check_together(parser, args):
    """Ends with a line where flags contradict each other."""
    for name in ("n_zoom_in", "view_terms"):
        if name in args.given and not args.upcycle:
            parser.error(f"--{name} says something of the views of --upcycle: give both")
    if "n_zoom_in" in args.given and "zoom_in" not in [name for _, name in args.upcycle]:
        parser.error("--n_zoom_in counts tiles of zoom_in, which --upcycle does not name")
    if args.cache_teacher and args.ext == "img":
        parser.error("--cache_teacher keeps its files in the data's cache, and --ext img keeps none: give one of them")
    if args.cache_teacher and args.width_mult:
        parser.error("--cache_teacher asks a teacher that stays as it is; under --width_mult it is trained along")
    if args.warmup >= args.epochs * args.test_every and args.warmup:
        parser.error(f"--warmup {args.warmup} is no shorter than the run, {args.epochs * args.test_every} iterations")
    if args.resume and args.reset:
        parser.error("--resume 1 continues a run and --reset replaces it: give one of them")
    if args.save_gt and not args.save_results:
        parser.error("--save_gt adds to --save_results: give both")
    for name in args.data_test:
        if name != PurePath(name).name or name == "..":
            parser.error(f"--data_test {name}: give the name of a folder in --dir_data or in its folder benchmark, such as "
                         f"{PurePath(os.path.normpath(name)).name.strip('.') or 'Set5'}")
    if args.batch_size % (args.n_GPUs * args.split_batch):
        parser.error(f"--batch_size {args.batch_size} cannot be divided evenly by --n_GPUs {args.n_GPUs} x --split_batch "
                     f"{args.split_batch}")
    if args.chop_mem and not args.chop:
        parser.error("--chop_mem bounds the memory of --chop: give both")
    experiments = str(ROOT / "experiment")
    folder, cache = os.path.normpath(os.path.join(experiments, args.ckp_dir)), os.path.join(experiments, "cache")
    if folder == experiments or f"{folder}/".startswith(f"{cache}/"):
        parser.error(f"--ckp_dir {args.ckp_dir!r}: {folder} is " + ("the folder of all runs" if folder == experiments else
                     "where decoded images are kept") + "; give the run a name of its own")


def published_loss(args):
    """The loss string behind FAKD's flags: `--alpha 0.5 --feature_distilation_type 10*SA` -> 0.5*DS+0.5*TS+10*SA."""
    terms = [f"{weight:g}*{name}" for weight, name in ((1 - args.alpha, "DS"), (args.alpha, "TS")) if weight]
    if args.feature_loss_used:
        terms.append(args.feature_distilation_type)
    return "+".join(terms)
