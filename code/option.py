"""Every flag of train.py and test.py. Imports no torch, so that --help is instant."""
import argparse
import math
import os
import re
from pathlib import Path

from template import TEMPLATES

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED_LOSS_FLAGS = ("alpha", "feature_loss_used", "feature_distilation_type")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def make_parser():
    parser = Parser(description="Distil a large super-resolution network into a small one, score it, use it.",
                    allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    group = parser.add_argument_group("machine")
    group.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    group.add_argument("--gpu_id", type=natural, default=0, help="which GPU to use")
    group.add_argument("--n_threads", type=natural, default=2,
                       help="processes that load training data; 0 loads in the main one")
    group.add_argument("--precision", choices=("single", "half", "bf16"), default="single",
                       help="of the networks' arithmetic; weights and losses stay float32")
    group.add_argument("--seed", type=natural, default=1, help="of weights, data order, crops and augmentation")

    group = parser.add_argument_group("data")
    group.add_argument("--dir_data", default=str(ROOT / "dataset"), help="folder that holds the datasets")
    group.add_argument("--data_train", default="DIV2K", help="training sets, A+B: Sample, DIV2K, or a folder DIR_DATA/A/HR")
    group.add_argument("--data_test", default="Set5+Set14+B100+Urban100",
                       help="test sets, A+B: Sample, DIV2K, a folder DIR_DATA/benchmark/A/HR or DIR_DATA/A/HR, or Demo")
    group.add_argument("--dir_demo", default=str(ROOT / "demo"), help="folder of your own images for --data_test Demo")
    group.add_argument("--data_range", default="1-800/801-810", help="DIV2K images, train/test")
    group.add_argument("--ext", choices=("sep", "img"), default="sep",
                       help="sep: decode each image once into a memory-mapped cache; img: read the files every time")
    group.add_argument("--dir_cache", default="",
                       help="folder of that cache (default: beside the data, or experiment/cache where that is read-only)")
    group.add_argument("--scale", type=int, choices=(2, 3, 4, 8), default=4, help="upscaling factor")
    group.add_argument("--patch_size", type=positive, default=192, help="side of the training crops, in HR pixels")
    group.add_argument("--no_augment", action="store_true", help="no flips and transposes of the crops")
    group.add_argument("--rgb_range", type=positive_number, default=255,
                       help="images reach the losses in [0, this]; published weights of DUKD, DCKD and MCADKD are for 1")

    group = parser.add_argument_group("networks (sizes left out: the file's, or those of the published student)")
    group.add_argument("--template", default="", help="presets, A+B, that explicit flags override: " + ", ".join(TEMPLATES))
    group.add_argument("--model", default="RCAN", help="the student: EDSR, RCAN")
    group.add_argument("--teacher", type=parse_list, default=None,
                       help="[A,B]: names of networks found in teacher_checkpoint/, or checkpoint files; of several, one "
                            "drawn per batch (default: the student's network)")
    group.add_argument("--n_resgroups", type=positive, help="residual groups of RCAN")
    group.add_argument("--n_resblocks", type=positive, help="residual blocks (of each group, in RCAN)")
    group.add_argument("--n_feats", type=positive, help="channels")
    group.add_argument("--reduction", type=positive, help="channels per squeezed channel in channel attention")
    group.add_argument("--res_scale", type=float, help="factor of EDSR's residual branches")
    group.add_argument("--pre_train", default="", help="checkpoint whose weights the student starts from")

    group = parser.add_argument_group("distillation")
    group.add_argument("--loss", default="", help="weighted terms, such as 0.5*DS+0.5*TS+10*SA; replaces the next three")
    group.add_argument("--alpha", type=float, default=0.5, help="weight of TS; DS gets 1 - alpha")
    group.add_argument("--feature_loss_used", type=int, choices=(0, 1), default=1, help="0 turns the feature terms off")
    group.add_argument("--feature_distilation_type", "--feature_distillation_type", default="10*SA",
                       help="weighted feature terms: SA, CA, IA, FSP, AT, fitnet, PSA, MMD, RBF")
    group.add_argument("--features", type=parse_features, default="[1,2,3]",
                       help="maps that feature terms compare: 0 head, 1 and 2 in the body, 3 its end")
    group.add_argument("--pool_size", type=positive, default=1, help="pooling of PSA, MMD and RBF")
    group.add_argument("--pool_type", choices=("max", "avg"), default="max", help="pooling of PSA, MMD and RBF")
    group.add_argument("--P", type=natural, default=2, help="order of RBF's Taylor series")
    group.add_argument("--rbf_gamma", type=float, default=5, help="gamma of RBF")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive, default=200, help="epochs to train")
    group.add_argument("--test_every", type=positive, default=1000, help="batches per epoch; an epoch ends with a test")
    group.add_argument("--batch_size", type=positive, default=16, help="crops per batch")
    group.add_argument("--optimizer", choices=("ADAM", "SGD", "RMSprop"), default="ADAM", help="optimiser")
    group.add_argument("--lr", type=positive_number, default=1e-4, help="learning rate")
    group.add_argument("--decay", type=parse_decay, default="150-300-450-600",
                       help="epochs after which the rate is multiplied by gamma, or cosine: to 0 over all epochs")
    group.add_argument("--gamma", type=float, default=0.5, help="factor of step decay")
    group.add_argument("--momentum", type=float, default=0.9, help="of SGD and RMSprop")
    group.add_argument("--betas", type=parse_betas, default="0.9,0.999", help="of ADAM")
    group.add_argument("--epsilon", type=float, default=1e-8, help="of ADAM and RMSprop")
    group.add_argument("--weight_decay", type=float, default=0, help="L2 penalty of the weights")
    group.add_argument("--gclip", type=float, default=0, help="clip the gradient's norm to this; 0: not at all")
    group.add_argument("--print_every", type=positive, default=100, help="batches between lines of the log")

    group = parser.add_argument_group("experiment")
    group.add_argument("--ckp_dir", default="first_try", help="folder of the run, under experiment/")
    group.add_argument("--resume", type=int, choices=(0, 1), default=0, help="1 continues the run in --ckp_dir exactly")
    group.add_argument("--reset", action="store_true", help="replace a run that --ckp_dir already holds")
    group.add_argument("--save_every", type=float, default=60, help="seconds between saves of the state to resume from")
    group.add_argument("--save_models", action="store_true", help="keep the model of every epoch")
    group.add_argument("--save_results", action="store_true", help="write the upscaled test images")
    group.add_argument("--save_gt", action="store_true", help="with --save_results, write LR and HR beside them")

    group = parser.add_argument_group("testing")
    group.add_argument("--ckp_path", default="", help="checkpoint to score; network, sizes and scale are read from it")
    group.add_argument("--TS", choices=("T", "S"), default="S",
                       help="what to score: S the student in --ckp_path; T the teacher there, or else the one found for "
                            "--teacher, --scale")
    group.add_argument("--chop", action="store_true", help="upscale large images in tiles, in bounded memory")
    group.add_argument("--self_ensemble", action="store_true", help="average over the 8 flips and transposes")
    return parser


def parse(argv=None):
    """Namespace of all flags, from sys.argv where argv is None; a mistake prints one line and exits with status 2.

    Beyond the flags: `given`, the names of those that were given explicitly; `loss`, the loss string, whichever flags
    said it; `data_train`, `data_test` and `teacher`, lists.
    """
    parser = make_parser()
    defaults = vars(parser.parse_args([]))
    unset = object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}

    preset = {}
    for name in filter(None, given.get("template", "").split("+")):
        if name not in TEMPLATES:
            parser.error(f"--template {name}: there are {', '.join(TEMPLATES)}")
        preset.update(TEMPLATES[name])
    argv_of_preset = [f"--{name}={value}" for name, value in preset.items()]
    preset = {name: getattr(parser.parse_args(argv_of_preset), name) for name in preset}

    args = argparse.Namespace(**{**defaults, **preset, **given}, given=frozenset(given))
    said_twice = [f"--{name}" for name in PUBLISHED_LOSS_FLAGS if name in given]
    if args.loss and said_twice:
        parser.error(f"{', '.join(said_twice)} beside the loss string {args.loss}: give the one or the other")
    if not 0 <= args.alpha <= 1:
        parser.error(f"--alpha {args.alpha:g} is not in 0..1")
    try:
        args.loss = args.loss or published_loss(args)
        parse_loss(args.loss)
    except ValueError as error:
        parser.error(str(error))
    if args.patch_size % args.scale:
        parser.error(f"--patch_size {args.patch_size} (HR pixels) is not a multiple of --scale {args.scale}")
    if args.resume and args.reset:
        parser.error("--resume 1 continues a run and --reset replaces it: give one of them")
    if args.save_gt and not args.save_results:
        parser.error("--save_gt adds to --save_results: give both")
    args.teacher = args.teacher or [args.model]
    for name in ("data_train", "data_test"):
        setattr(args, name, parse_list(getattr(args, name)))
    return args


def published_loss(args):
    """The loss string behind FAKD's flags: `--alpha 0.5 --feature_distilation_type 10*SA` -> 0.5*DS+0.5*TS+10*SA."""
    terms = [f"{weight:g}*{name}" for weight, name in ((1 - args.alpha, "DS"), (args.alpha, "TS")) if weight]
    if args.feature_loss_used:
        terms.append(args.feature_distilation_type)
    return "+".join(terms)


def parse_loss(string):
    """'0.5*DS+1e-3*GAN' -> [(0.5, 'DS'), (0.001, 'GAN')]; raises ValueError."""
    terms = []
    for part in re.split(r"(?<![eE])\+", string.replace(" ", "")):
        match = re.fullmatch(r"(?:([0-9.]+(?:[eE][+-]?[0-9]+)?)\*)?([A-Za-z_]\w*)", part)
        if not match:
            raise ValueError(f"loss {string!r}: {part!r} is not of the form WEIGHT*TERM")
        try:
            weight = float(match[1] or 1)
        except ValueError:
            raise ValueError(f"loss {string!r}: {match[1]!r} is not a number") from None
        if match[2] in [name for _, name in terms]:
            raise ValueError(f"loss {string!r}: {match[2]} stands there twice")
        terms.append((weight, match[2]))
    return terms


def parse_list(string):
    """'[A,B]', 'A,B' and 'A+B' -> ['A', 'B']; the path of an existing file stays whole, whatever is in its name."""
    if os.path.exists(string):
        return [string]
    names = [name.strip() for name in re.split(r"[,+]", string.strip().removeprefix("[").removesuffix("]"))]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{string!r} is not a list such as [A,B] or A+B")
    return names


def parse_features(string):
    try:
        features = [int(word) for word in string.strip().removeprefix("[").removesuffix("]").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{string!r} is not a list such as [1,2,3]") from None
    if not set(features) <= {0, 1, 2, 3} or len(set(features)) < len(features):
        raise argparse.ArgumentTypeError(f"{string!r}: there are four maps, 0 to 3, each at most once")
    return features


def parse_decay(string):
    if string == "cosine":
        return string
    try:
        epochs = [int(word) for word in string.split("-")]
    except ValueError:
        epochs = [0]
    if min(epochs) < 1 or epochs != sorted(set(epochs)):
        raise argparse.ArgumentTypeError(f"{string!r} is neither cosine nor rising epochs such as 150-300")
    return epochs


def parse_betas(string):
    try:
        first, second = (float(word) for word in string.strip("() ").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{string!r} is not a pair such as 0.9,0.999") from None
    if not (0 <= first < 1 and 0 <= second < 1):
        raise argparse.ArgumentTypeError(f"{string!r}: both must be in 0..1")
    return first, second


def natural(string):
    return _number(string, int, lambda value: value >= 0, "a whole number, 0 or more")


def positive(string):
    return _number(string, int, lambda value: value > 0, "a whole number, 1 or more")


def positive_number(string):
    return _number(string, float, lambda value: 0 < value < math.inf, "a number above 0")


def _number(string, kind, valid, description):
    try:
        value = kind(string)
    except ValueError:
        value = None
    if value is None or not valid(value):
        raise argparse.ArgumentTypeError(f"{string!r} is not {description}")
    return value
